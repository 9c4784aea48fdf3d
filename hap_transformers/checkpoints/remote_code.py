"""Copies the modules that rebuild a pruned model beside its weights, so that it loads without this package."""

import json
import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from .. import components
from ..components.architectures import ARCHITECTURES
from ..components.groups import KINDS
from ..components.record import recorded_structure
from ..files import write_text
from ..sentence_encoders import transformer_folder


# The copied modules of `components`, with names to import from each. They depend only on torch and transformers.
MODULES = {
    "releases": "TRANSFORMERS_4",
    "names": "Architecture, Chain, ChannelNames, DecoderNames, EmbeddingNames, HeadNames, NeuronNames",
    "convolutional": "CONVOLUTIONAL",
    "shared_names": "BERT_NEURONS",
    "vision": "VISION",
    "decoders": "DECODERS",
    "encoder_decoders": "ENCODER_DECODERS",
    "gguf": "quantized_by",
    "record": "recorded_structure",
    "architectures": "ARCHITECTURES, Architecture, EmbeddingNames, HeadNames, NeuronNames",
    "subclasses": "take_class",
    "spreading": "spread_outputs",
    "projections": "Projection",
    "convolutions": "Convolution",
    "response_norm": "ResponseNorm",
    "forwards": "eager_model",
    "groups": "find_groups, freeze_idle_parameters",
    "runs": "Runs",
    "embedding_dims": "EMBEDDING_DIMS, validate_resizable",
    "pointwise": "ImplantedConvolution",
    "sharded": "is_sharded",
    "attention_forwards": "headless",
    "heads": "HEADS",
    "head_dims": "VALUE_DIMS",
    "neurons": "NEURONS",
    "channels": "CHANNELS",
    "layers": "LAYERS",
    "slicing": "keep_components",
    "depth": "emptied_layers",
    "plain_config": "saved_config",
    "structure": "rebuild_structure",
}
# The module of the exported classes, and how their names begin.
EXPORTED, PREFIX = "modeling_hap", "Pruned"
COMPONENTS = Path(components.__file__).parent
SHIPPED = dict(ARCHITECTURES)
SHIPPED_KINDS = set(KINDS)

MODELING = '''"""Models pruned by hap_transformers, for `trust_remote_code=True` where it is not installed."""

import transformers

# Transformers 4 copies only the modules that are imported here.
{imports}

{entry}
class PrunedModel:
    """Prunes a model to the structure in its config before its weights are loaded."""

    def __init__(self, config, *args, **kwargs):
        pruned_heads = getattr(config, "pruned_heads", None) or {{}}
        config.pruned_heads = {{}}  # Transformers 4 would prune each part of the model separately.
        super().__init__(config, *args, **kwargs)
        for known in (config, self.config):
            known.pruned_heads = {{int(layer): heads for layer, heads in pruned_heads.items()}}
        structure = recorded_structure(config)
        if structure is None:
            raise ValueError("The config has no quantization_config, which records how the model was pruned.")
        rebuild_structure(self, structure)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        freeze_idle_parameters(find_groups(model))
        return loaded

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        if new_num_tokens is not None:
            validate_resizable(self)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

'''


# Another release of Transformers may lack a class. The exported code can still be imported there.
MODEL_CLASS = """
if hasattr(transformers, "{name}"):

    class Pruned{name}(PrunedModel, transformers.{name}):
        _auto_class = "{auto_class}"

"""


def _validate_loaded_by_auto_class(config: PretrainedConfig) -> None:
    """Refuses encoders that Sentence Transformers loads by a class of their own, which `auto_map` does not replace."""
    if config.model_type == "t5":
        raise ValueError(
            "Sentence Transformers loads the encoder of a T5 by its class in transformers, also with "
            "trust_remote_code=True. So exported code would not be used. Load the folder after "
            "`import hap_transformers`."
        )


def export_remote_code(folder: str | Path) -> None:
    """Makes a saved pruned model loadable without this package.

    The function copies the modules that rebuild the structure into the folder. It writes one subclass for each class
    that Transformers has for the model's type, and adds an `auto_map` with these subclasses to `config.json`. Then

    ```python
    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    ```

    loads the pruned model on machines that have only torch and transformers. In a folder of the Sentence Transformers
    library, `SentenceTransformer(folder, trust_remote_code=True)` does.

    Args:
        folder (`str` or `Path`): The folder in which `save_pretrained` saved the model.

    Raises:
        FileNotFoundError: If the folder has no `config.json`.
        ValueError: If the config records no pruning, Transformers has no class for the model's type, the model was
            pruned by a custom kind of component, or Sentence Transformers would not use the code.
    """
    folder = Path(folder)
    # Code is looked for in the repository's root, also for a model in a folder below.
    path = folder / (transformer_folder(folder) if (folder / "modules.json").is_file() else "") / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{path.parent}' has no config.json; save the model there first.")
    config = AutoConfig.from_pretrained(path.parent)
    structure = recorded_structure(config)
    if structure is None:
        raise ValueError("The config records no pruning; a dense model needs no remote code.")
    if (folder / "modules.json").is_file():
        _validate_loaded_by_auto_class(config)
    custom = sorted(structure.keys() & (KINDS.keys() - SHIPPED_KINDS))
    if custom:
        raise ValueError(
            f"The model was pruned by custom kinds of component, {', '.join(custom)}, whose code is not part of "
            "hap_transformers. Publish that code yourself, with hap_transformers as a requirement."
        )
    classes = _classes_of(config)
    if not classes or config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Transformers has no model class, or hap_transformers has no entry, for a '{type(config).__name__}'. "
            "Publish the model's code yourself, with hap_transformers as a requirement."
        )
    entry = ""
    if ARCHITECTURES[config.model_type] != SHIPPED.get(config.model_type):
        entry = f"ARCHITECTURES[{config.model_type!r}] = {ARCHITECTURES[config.model_type]!r}\n\n"
    imports = "\n".join(f"from .hap_{module} import {name}  # noqa: F401" for module, name in MODULES.items())
    source = MODELING.format(imports=imports, entry=entry)
    # Each class names its first auto class: Transformers 4 copies the code with a saved model only if one is named.
    made = {name: auto_class for auto_class, name in reversed(classes.items())}
    for name, auto_class in sorted(made.items()):
        source += MODEL_CLASS.format(name=name, auto_class=auto_class)
    write_text(folder / f"{EXPORTED}.py", source.rstrip() + "\n")
    for module in MODULES:
        text = (COMPONENTS / f"{module}.py").read_text(encoding="utf-8")
        renamed = re.sub(r"^from \.(\w+) import", r"from .hap_\1 import", text, flags=re.MULTILINE)
        write_text(folder / f"hap_{module}.py", renamed)
    auto_map = {auto_class: f"{EXPORTED}.{PREFIX}{name}" for auto_class, name in classes.items()}
    values = json.loads(path.read_text(encoding="utf-8"))
    values["auto_map"] = {**values.get("auto_map", {}), **auto_map}
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _classes_of(config: PretrainedConfig) -> dict[str, str]:
    """Maps the name of each auto class that knows the config's type to the name of the class that it makes."""
    classes = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            made = mapping[type(config)]
            made = made[0] if isinstance(made, tuple | list) else made
            if made.__module__.startswith("transformers."):  # The exported code extends no others.
                classes[name] = made.__name__
    return classes
