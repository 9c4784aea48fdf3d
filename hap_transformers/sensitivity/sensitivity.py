"""`Sensitivity`: what every scoring method returns, and what planning reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import whole_file
from .methods import METHODS


Layers = list[torch.Tensor]

_BY_KIND = ("scores", "order", "traces", "stderr")
_PLAIN = (
    *("method", "comparable", "foresees_refit", "in_loss_units", "model"),
    *("num_examples", "num_probes", "reliability", "converged", "seconds", "basis", "model_type"),
)
# Names that the first release gave to the tensors of a layer.
_FIRST_RELEASE = {
    "heads": ("scores", "heads"),
    "head_order": ("order", "heads"),
    "head_traces": ("traces", "heads"),
    "head_stderr": ("stderr", "heads"),
    "neurons": ("scores", "neurons"),
    "neuron_order": ("order", "neurons"),
    "neuron_traces": ("traces", "neurons"),
    "neuron_stderr": ("stderr", "neurons"),
}


@dataclass(eq=False)  # Tensors have no single truth value.
class Sensitivity:
    """Scores of the components that a model still has, by kind and layer.

    Higher scores matter more. All tensors are on the CPU, float64 except for the orders.

    Args:
        method (`str`): Name of the method, one of `hap_transformers.METHODS`, or any other for custom scores.
        scores (`dict[str, list[torch.Tensor]]`): For each kind that was scored (such as `"neurons"`), one tensor
            per layer, shape `(num_components,)`. For the trace methods it holds the relative trace
            Tr(H_cc) / (2 p_c) * ||w_c||^2 of [HAP](https://arxiv.org/abs/2101.08940), in units of the loss. For
            `"kronecker"` it holds what a removal adds to the loss when its turn comes, the others being refitted; of
            whole layers, how much they change what they read.
        order (`dict[str, list[torch.Tensor]]`, *optional*): Each component's place, from 0, in the order in which its
            layer loses components; int64. Scores never fall in that order. For `"kronecker"`.
        traces (`dict[str, list[torch.Tensor]]`, *optional*): Raw traces Tr(H_cc) or Tr(G_cc), for the trace methods.
        stderr (`dict[str, list[torch.Tensor]]`, *optional*): Standard errors of `traces`, over examples and probes.
        interactions (`torch.Tensor`, *optional*): For `"fisher"`, the matrix F over the heads of all layers in order,
            shape `(heads of all layers, heads of all layers)`. Removing a set of heads changes the loss by about half
            the sum of F over all pairs in the set.
        comparable (`bool`): Whether scores of different kinds compare. Otherwise the same share of each kind goes.
        foresees_refit (`bool`): Whether scores account for a refit of what is left, so that planning needs no floors.
        in_loss_units (`bool`): Whether scores are changes of the loss.
        num_examples (`int`): Examples scored on; 0 for methods that need no data.
        num_probes (`int`): Random probes per batch; 0 where nothing was random.
        reliability (`float`, *optional*): Split-half rank correlation (Spearman) of the scores of the first kind that
            was scored, over the whole model, corrected to full length by the Spearman-Brown formula. 1 is a ranking
            that another sample would repeat, 0 is noise. `None` if there was a single sample. For `"kronecker"` it is
            computed from the traces, not from the final costs.
        converged (`bool`, *optional*): Whether `reliability` reached the `tolerance` asked for (`True`), or all
            examples and probes were used before (`False`); `None` if no tolerance was given.
        seconds (`float`): Time it took.
        model (`str`): Name or folder of the model, as it was loaded.
        basis (`str`): Name of the basis of the heads whose dimensions were scored (`config.aligned_heads`, see
            [`align_heads`]); `""` where none were, or the heads were not aligned.
        model_type (`str`): The model's `config.model_type`; `""` where it is not known.
    """

    method: str
    scores: dict[str, Layers] = field(default_factory=dict)
    order: dict[str, Layers] = field(default_factory=dict)
    traces: dict[str, Layers] = field(default_factory=dict)
    stderr: dict[str, Layers] = field(default_factory=dict)
    interactions: torch.Tensor | None = None
    comparable: bool = False
    foresees_refit: bool = False
    in_loss_units: bool = False
    num_examples: int = 0
    num_probes: int = 0
    reliability: float | None = None
    converged: bool | None = None
    seconds: float = 0.0
    model: str = ""
    basis: str = ""
    model_type: str = ""

    @property
    def heads(self) -> Layers | None:
        """The score of each head, one tensor per layer; `None` if heads were not scored."""
        return self.scores.get("heads")

    @property
    def neurons(self) -> Layers | None:
        """The score of each FFN neuron, one tensor per layer; `None` if neurons were not scored."""
        return self.scores.get("neurons")

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the plain fields as JSON metadata."""
        tensors = {
            f"{name}.{kind}.{layer}": tensor.contiguous()
            for name in _BY_KIND
            for kind, layers in getattr(self, name).items()
            for layer, tensor in enumerate(layers)
        }
        if self.interactions is not None:
            tensors["interactions"] = self.interactions
        plain = {name: getattr(self, name) for name in _PLAIN}
        with whole_file(path) as unfinished:
            save_file(tensors, str(unfinished), metadata={"sensitivity": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Reads what `save` wrote, this release's or the first's.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a saved `Sensitivity`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No sensitivity file at '{path}'.")
        try:
            with safe_open(str(path), framework="pt") as file:
                plain = json.loads(file.metadata()["sensitivity"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            fields: dict[str, Any] = {
                **_facts(plain["method"]),
                **{name: plain[name] for name in _PLAIN if name in plain},
            }
            fields["interactions"] = tensors.pop("interactions", tensors.pop("head_interactions", None))
            for name in sorted(tensors, key=lambda name: int(name.rpartition(".")[2])):
                group = name.rpartition(".")[0]
                what, kind = _FIRST_RELEASE.get(group) or group.split(".")
                if what not in _BY_KIND:
                    raise KeyError(name)
                fields.setdefault(what, {}).setdefault(kind, []).append(tensors[name])
            return cls(**fields)
        except (SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a file written by Sensitivity.save: {error}") from error


def _facts(method: str) -> dict[str, bool]:
    """The facts about a method, which files of the first release do not hold."""
    known = METHODS.get(method)
    names = ("comparable", "foresees_refit", "in_loss_units")
    return {name: getattr(known, name) for name in names} if known else {}
