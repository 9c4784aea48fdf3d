"""`Sensitivity`: what every scoring method returns, and what planning reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import whole_file


_LIST_FIELDS = (
    *("heads", "neurons", "head_order", "neuron_order"),
    *("head_traces", "neuron_traces", "head_stderr", "neuron_stderr"),
)
_PLAIN_FIELDS = ("method", "model", "num_examples", "num_probes", "reliability", "converged", "seconds")


@dataclass
class Sensitivity:
    """Scores of the heads and FFN neurons that a model still has, layer by layer.

    All tensors are on the CPU, float64 but for the orders, and all lists have one tensor a layer. Higher scores matter
    more. Scores of heads and of neurons are comparable for `"kronecker"`, the trace methods and `"fisher"`, which
    measure changes of the loss.

    Args:
        method (`str`): Name of the method, one of `hap_transformers.METHODS`.
        heads (`list[torch.Tensor]`, *optional*): The score S_c of each head, shape `(num_heads,)`. For the trace
            methods the relative trace Tr(H_cc) / (2 p_c) * ||w_c||^2 of [HAP](https://arxiv.org/abs/2101.08940), in
            units of the loss; for `"kronecker"` what its removal adds to the loss when its turn comes, the others
            being refitted. `None` if heads were not scored.
        neurons (`list[torch.Tensor]`, *optional*): The score of each FFN neuron, shape `(num_neurons,)`.
        head_order (`list[torch.Tensor]`, *optional*): For `"kronecker"`, each head's place, from 0, in the order in
            which its layer loses heads; int64. Scores never fall in that order.
        neuron_order (`list[torch.Tensor]`, *optional*): The same of neurons.
        head_traces (`list[torch.Tensor]`, *optional*): Raw traces Tr(H_cc) or Tr(G_cc), for the trace methods.
        neuron_traces (`list[torch.Tensor]`, *optional*): The same of neurons.
        head_stderr (`list[torch.Tensor]`, *optional*): Standard errors of `head_traces`, over examples and probes.
        neuron_stderr (`list[torch.Tensor]`, *optional*): Standard errors of `neuron_traces`.
        head_interactions (`torch.Tensor`, *optional*): For `"fisher"`, the matrix F over the heads of all layers in
            order, shape `(heads of all layers, heads of all layers)`. Removing a set of heads changes the loss by
            about half the sum of F over all pairs in the set.
        num_examples (`int`): Examples scored on; 0 for methods that look at none.
        num_probes (`int`): Random probes a batch; 0 where nothing was random.
        reliability (`float`, *optional*): Split-half rank correlation (Spearman) of the head scores over the whole
            model (of the neurons', if only they were scored), corrected to full length by the Spearman-Brown formula.
            1 is a ranking that another sample would repeat, 0 is noise. `None` if there was a single sample.
        converged (`bool`, *optional*): Whether `reliability` reached the `tolerance` asked for (`True`) or examples
            and probes were spent before (`False`); `None` if none was asked for.
        seconds (`float`): Time it took.
        model (`str`): Name or folder of the model, as it was loaded.
    """

    method: str
    heads: list[torch.Tensor] | None = None
    neurons: list[torch.Tensor] | None = None
    head_order: list[torch.Tensor] | None = None
    neuron_order: list[torch.Tensor] | None = None
    head_traces: list[torch.Tensor] | None = None
    neuron_traces: list[torch.Tensor] | None = None
    head_stderr: list[torch.Tensor] | None = None
    neuron_stderr: list[torch.Tensor] | None = None
    head_interactions: torch.Tensor | None = None
    num_examples: int = 0
    num_probes: int = 0
    reliability: float | None = None
    converged: bool | None = None
    seconds: float = 0.0
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the plain fields as JSON metadata."""
        tensors = {
            f"{field}.{layer}": tensor.contiguous()
            for field in _LIST_FIELDS
            for layer, tensor in enumerate(getattr(self, field) or [])
        }
        if self.head_interactions is not None:
            tensors["head_interactions"] = self.head_interactions
        plain = {field: getattr(self, field) for field in _PLAIN_FIELDS}
        with whole_file(path) as unfinished:
            save_file(tensors, str(unfinished), metadata={"sensitivity": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Reads what `save` wrote.

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
            fields: dict[str, Any] = {field: plain[field] for field in _PLAIN_FIELDS if field in plain}
            fields["head_interactions"] = tensors.pop("head_interactions", None)
            layers = sorted(tensors, key=lambda name: int(name.rpartition(".")[2]))
            for field in _LIST_FIELDS:
                fields[field] = [tensors[name] for name in layers if name.rpartition(".")[0] == field] or None
            return cls(**fields)
        except (SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a file written by Sensitivity.save: {error}") from error
