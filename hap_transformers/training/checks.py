"""What `HapTrainer` refuses when it is made, instead of after hours of training."""

import inspect
from collections.abc import Sized
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..components.architectures import get_architecture
from ..components.forwards import validate_forwards
from ..components.groups import find_groups, kinds_in_use
from ..components.releases import writes_safetensors
from ..components.slicing import validate_sliceable
from ..components.structure import validate_savable
from ..forward_modes import validate_mode
from ..planning.budgets import dense_counts
from ..planning.kinds import kinds_to_prune
from ..planning.latency_measuring import validate_measurable
from ..planning.latency_table import LatencyTable
from ..planning.uniform_layers import validate_uniform
from ..refit.tune_layers import epochs_to_tune
from ..sensitivity.self_loss import head_of
from ..tokens import positions, validate_length
from .config import HapConfig


def validate_loaded(who: str, model: PreTrainedModel) -> None:
    """Checks that all weights of a model are in memory.

    Args:
        who (`str`): The model's part in the training.
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: If some are offloaded, or on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"The weights of {who} ({type(model).__name__}) are not in memory but on the meta device or offloaded. "
            "Load it by from_pretrained on one device."
        )


def validate_prunable(model: PreTrainedModel, config: HapConfig) -> None:
    """Checks that a model can be pruned as its configuration asks.

    Raises:
        TypeError: If it is no model of Transformers.
        ValueError: If its architecture is unknown, its weights cannot be sliced, its checkpoints could not be loaded,
            a forward was replaced, it lacks the components that shall go, it takes shorter texts or returns no hidden
            states where the configuration needs them, its layers cannot be tuned, or its config has no numbers for
            what a uniform plan leaves.
    """
    get_architecture(model)  # `Trainer` takes wrappers, such as compiled models, which cannot be saved as they are.
    validate_savable(model)
    validate_forwards(model)
    validate_sliceable(model, find_groups(model))
    kinds = kinds_to_prune(config.components, config.method, config, model)
    if config.uniform:
        validate_uniform(model, kinds)
    if config.sequence_length is not None:
        validate_length(model, config.sequence_length)
    if config.distillation_hidden:
        _validate_hidden_states("The model", model)
    epochs_to_tune(config.tuning_epochs, config.refit, model)


def validate_latency(
    config: HapConfig, model: PreTrainedModel, table: LatencyTable | None, device: torch.device
) -> None:
    """Checks that a configuration's latency can be planned for.

    Args:
        config (`HapConfig`): The configuration.
        model (`PreTrainedModel`): The model.
        table (`LatencyTable`, *optional*): A table that was measured before; without it one is measured.
        device (`torch.device`): Where the model runs.

    Raises:
        ValueError: If the table was measured in another mode or is of other models, or none can be measured with this
            model, or on the device in this mode.
    """
    if table is not None:
        table.validate_mode(config.latency_mode)
        kinds = kinds_to_prune(config.components, config.method, config, model)
        groups = find_groups(model, kinds_in_use(model, kinds))
        table.validate(model, groups, dense_counts(model, groups))
    elif config.budget == "latency":
        validate_mode(config.latency_mode, device)
        validate_measurable(model)


def validate_arguments(args: TrainingArguments, model: PreTrainedModel, config: HapConfig, train_dataset: Any) -> None:
    """Checks that training arguments and data can be used for recovery.

    Raises:
        ValueError: If evaluation would cast the model in place, checkpoints could not be loaded, or epochs are asked
            for of data without a length.
    """
    if not writes_safetensors(args):
        raise ValueError(
            "save_safetensors=False saves pytorch_model.bin, and pruned models are loaded from safetensors only. "
            "Leave it out."
        )
    for flag, dtype in (("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)):
        if getattr(args, flag) and model.dtype != dtype:
            raise ValueError(
                f"{flag}=True casts the weights to {dtype} in evaluate() for good, so that recovery and the saved "
                f"model would be of low precision. Leave it out; {flag[:4]}=True evaluates in {flag[:4]}, too."
            )
    if config.recovery_epochs is not None and train_dataset is not None and not isinstance(train_dataset, Sized):
        raise ValueError(
            f"recovery_epochs={config.recovery_epochs} needs a data set with a length, and the train_dataset is a "
            f"{type(train_dataset).__name__}. Leave it out; recovery then takes max_steps as fine-tuning does."
        )


def validate_recovery_check(config: HapConfig, eval_dataset: Any, several: bool) -> None:
    """Checks that there is an evaluation set if recovery shall be judged by it.

    Args:
        config (`HapConfig`): The configuration.
        eval_dataset (`Any`): The evaluation set.
        several (`bool`): Whether the trainer takes several data sets for one.

    Raises:
        ValueError: If there is none, or there are several for a trainer that takes one.
    """
    too_many = isinstance(eval_dataset, dict) and not several
    if config.recovery_check == "eval" and (eval_dataset is None or too_many):
        given = "has no eval_dataset" if eval_dataset is None else f"has {len(eval_dataset)} evaluation sets"
        raise ValueError(
            f"recovery_check='eval' judges recovery by the evaluation set, and HapTrainer {given}. Pass one, or set "
            "recovery_check='held_out'."
        )


def validate_teacher(teacher: Any, model: PreTrainedModel, config: HapConfig | None) -> None:
    """Checks that a model can be distilled from a teacher.

    Args:
        teacher (`PreTrainedModel`): The teacher.
        model (`PreTrainedModel`): The model that learns from it.
        config (`HapConfig`, *optional*): What is distilled; by default nothing is.

    Raises:
        TypeError: If the teacher is no model of Transformers.
        ValueError: If it is of another task, or its labels, vocabulary, outputs or hidden states do not fit the
            model's.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"The teacher is a {type(teacher).__name__}; give a model of Transformers, such as one loaded by "
            "AutoModelForSequenceClassification.from_pretrained(...)."
        )
    if config is None or not config.distils:
        return
    validate_loaded("the teacher", teacher)
    if _is_headless(teacher) and not _is_headless(model):
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, which has no head and so no logits to distil. Give a teacher "
            "that was trained for the same task, or set distillation=0."
        )
    names = f"The teacher ({type(teacher).__name__}) and the model ({type(model).__name__})"
    facts = {
        "task": (_task(teacher), _task(model)),
        "problem type": tuple(_size(m, "problem_type") for m in (teacher, model)),
        "number of labels": tuple(len(_labels(m) or ()) or None for m in (teacher, model)),
        "order of labels": _same_names(_labels(teacher), _labels(model)),
        "output form (config.return_dict)": tuple(getattr(m.config, "return_dict", True) for m in (teacher, model)),
        "number of predicted tokens": tuple(_predicted(m) for m in (teacher, model)),
        "image size": tuple(_size(m, "image_size") for m in (teacher, model)),
    }
    if config.distillation_hidden:
        facts["hidden size"] = tuple(_size(m, "hidden_size") for m in (teacher, model))
        facts["number of layers"] = tuple(_size(m, "num_hidden_layers") for m in (teacher, model))
        _validate_hidden_states("The teacher", teacher)
    for fact, (theirs, ours) in facts.items():
        if theirs != ours and None not in (theirs, ours):
            raise ValueError(
                f"{names} differ in the {fact}: {theirs} and {ours}. Give a teacher that was trained for the same "
                "task, or set distillation=0."
            )
    _validate_inputs(names, teacher, model)


def _validate_inputs(names: str, teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Refuses a teacher whose embeddings are too small for what the model reads."""
    sizes: dict[str, tuple[str, int | None, int | None]] = {
        "vocabulary": ("tokens", _embedded(teacher), _embedded(model)),
        "length of texts": ("positions", positions(teacher), positions(model)),
        # A model without types of tokens ignores them.
        "types of tokens": (
            "types",
            _size(teacher, "type_vocab_size") or None,
            _size(model, "type_vocab_size") or None,
        ),
    }
    for fact, (things, known, read) in sizes.items():
        if known is not None and read is not None and known < read:
            raise ValueError(
                f"{names} differ in the {fact}: the teacher reads {known} {things}, the model {read}. Resize the "
                "embeddings of both, or give a teacher with the same tokenizer."
            )


def _validate_hidden_states(who: str, model: PreTrainedModel) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "output_hidden_states" not in parameters and not takes_any:
        raise ValueError(
            f"{who} ({type(model).__name__}) takes no argument output_hidden_states, which distillation_hidden needs. "
            "Add it to its forward, or set distillation_hidden=0."
        )


def _task(model: PreTrainedModel) -> str | None:
    """End of the name of the model's class in Transformers, such as `ForSequenceClassification`."""
    head = head_of(model)
    return None if head == "Model" else head


def _is_headless(model: PreTrainedModel) -> bool:
    """Whether a model is a bare encoder or decoder of Transformers."""
    name = type(model).__name__
    shipped = type(model).__module__.startswith("transformers.models.")
    return shipped and name.endswith("Model") and "LMHead" not in name


def _labels(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Names of the classes of a classifier, in the order of its outputs."""
    if "Classification" not in (_task(model) or ""):
        return None
    return tuple(str(name).lower() for _, name in sorted((model.config.id2label or {}).items()))


def _same_names(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> tuple[Any, Any]:
    """Both lists of labels if they hold the same names, so that their orders can be compared; else nothing."""
    return (first, second) if first and second and sorted(first) == sorted(second) else (None, None)


def _predicted(model: PreTrainedModel) -> int | None:
    """Number of tokens that a language model predicts."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None)


def _embedded(model: PreTrainedModel) -> int | None:
    """Number of tokens that a model reads."""
    embeddings = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def _size(model: PreTrainedModel, name: str) -> Any:
    return getattr(model.config, name, None)
