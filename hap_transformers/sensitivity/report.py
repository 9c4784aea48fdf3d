"""`Sensitivity`: what every scoring method returns, and what planning reads."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


_TENSOR_FIELDS = ("heads", "head_traces", "head_stderr")
_PLAIN_FIELDS = ("method", "num_examples", "num_probes", "reliability", "seconds")


@dataclass
class Sensitivity:
    """Scores of the heads that a model still has, layer by layer.

    Args:
        method (`str`): Name of the method, a key of `hap_transformers.METHODS`.
        heads (`list[torch.Tensor]`): Per layer, the score S_c of each head, shape `(num_heads,)`, float64 on the CPU.
            Higher matters more. For `"hessian_trace"` the relative trace Tr(H_cc) / (2 p_c) * ||w_c||^2 of
            [HAP](https://arxiv.org/abs/2101.08940), in units of the loss.
        head_traces (`list[torch.Tensor]`, *optional*): Raw traces Tr(H_cc), for the trace methods.
        head_stderr (`list[torch.Tensor]`, *optional*): Standard errors of `head_traces`.
        num_examples (`int`): Examples scored on.
        num_probes (`int`): Random probes a batch; 0 for methods that draw none.
        reliability (`float`, *optional*): Split-half rank correlation (Spearman) of the head scores over the whole
            model, corrected to full length by the Spearman-Brown formula. 1 is a ranking that another sample would
            repeat, 0 is noise. `None` if there was a single sample.
        seconds (`float`): Time it took.
    """

    method: str
    heads: list[torch.Tensor]
    head_traces: list[torch.Tensor] | None = None
    head_stderr: list[torch.Tensor] | None = None
    num_examples: int = 0
    num_probes: int = 0
    reliability: float | None = None
    seconds: float = 0.0

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the plain fields as JSON metadata."""
        tensors = {
            f"{field}.{layer}": tensor.contiguous()
            for field in _TENSOR_FIELDS
            for layer, tensor in enumerate(getattr(self, field) or [])
        }
        plain = {field: getattr(self, field) for field in _PLAIN_FIELDS}
        save_file(tensors, str(path), metadata={"sensitivity": json.dumps(plain)})

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
                keys = sorted(file.keys(), key=lambda key: int(key.rpartition(".")[2]))
                lists = {
                    field: [file.get_tensor(key) for key in keys if key.rpartition(".")[0] == field] or None
                    for field in _TENSOR_FIELDS
                }
            return cls(**lists, **{field: plain[field] for field in _PLAIN_FIELDS})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a file written by Sensitivity.save: {error}") from error
