"""Fidelity: how far the outputs of a pruned model moved from those of the dense model. It needs no labels."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..efficiency import evaluating
from ..sensitivity.outputs import named_tensors
from ..sensitivity.self_loss import SelfLoss, head_of
from ..tokens import mask_of, valid_tokens
from .wording import FIDELITY


Embed = Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor]


def measure_fidelity(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    embed: Embed | None = None,
) -> dict[str, float]:
    """Compares what two models return for the same batches.

    Args:
        model (`PreTrainedModel`): The pruned model.
        dense (`PreTrainedModel`): The dense model, on the same device.
        batches (`Iterable[Mapping[str, Any]]`): Inputs; labels are not needed.
        embed (`Callable`, *optional*): Takes a model and a batch, returns the embeddings to compare, shape
            `(examples, features)`. By default that of [`SelfLoss`] for models without a head.

    Returns:
        `dict[str, float]`: By the model's task:

        - classes (of texts, images, choices, tokens, spans, the next token): `"agreement"`, the share of equal
          predictions, and `"kl"`, the mean KL divergence of the pruned from the dense distribution in nats;
        - several labels at once: the same, over all labels;
        - values: `"correlation"` and `"relative_error"`, the root mean square difference in standard deviations of the
          dense model's values;
        - embeddings: `"cosine"`, the mean over examples.

        It is empty where nothing is known of the model's outputs.

    Raises:
        ValueError: If there are no batches.
    """
    head = head_of(model)
    compare = _embeddings_by(embed) if embed is not None or head in (None, "Model") else _COMPARED.get(head or "")
    sums = _Sums()
    if compare is None:
        return {}
    with evaluating(model), evaluating(dense):
        for batch in batches:
            compare(sums, model, dense, send_to_device(dict(batch), model.device))
    if not sums.seen:
        raise ValueError("There are no examples to compare the models on.")
    return sums.figures()


@dataclass
class _Sums:
    """Sums over positions by figure, and all values of regressions."""

    seen: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, count: int, **figures: torch.Tensor) -> None:
        self.seen += count
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.double().sum())

    def figures(self) -> dict[str, float]:
        found = {name: total / max(self.seen, 1) for name, total in self.totals.items()}
        if self.values:
            ours, theirs = (torch.cat(part).double() for part in zip(*self.values, strict=True))
            spreads = [float(values.std(unbiased=False)) for values in (ours, theirs)]
            if spreads[1]:  # Both figures are undefined where all values are equal.
                found["relative_error"] = float((ours - theirs).square().mean().sqrt()) / spreads[1]
            if all(spreads):
                found["correlation"] = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
        return {name: found[name] for name in FIDELITY if name in found}


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_Compare = Callable[[_Sums, PreTrainedModel, PreTrainedModel, dict[str, Any]], None]


def _embeddings_by(embed: Embed | None) -> _Compare:
    def of_self_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        return SelfLoss().embedding(model, model(**inputs), inputs)

    def compare(sums: _Sums, model: PreTrainedModel, dense: PreTrainedModel, inputs: dict[str, Any]) -> None:
        ours, theirs = ((embed or of_self_loss)(either, inputs) for either in (model, dense))
        sums.add(len(ours), cosine=F.cosine_similarity(_precise(ours), _precise(theirs), dim=-1))

    return compare


def _distributions(*names: str, counted: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]) -> _Compare:
    """Compares distributions over the last dimension of some logits, at the positions that count."""

    def compare(sums: _Sums, model: PreTrainedModel, dense: PreTrainedModel, inputs: dict[str, Any]) -> None:
        ours, theirs = named_tensors(model(**inputs)), named_tensors(dense(**inputs))
        for name in names:
            p, q = (_precise(counted(logits[name], inputs)).log_softmax(-1) for logits in (theirs, ours))
            kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            sums.add(len(p), agreement=p.argmax(-1) == q.argmax(-1), kl=kl)

    return compare


def _classified(sums: _Sums, model: PreTrainedModel, dense: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Sequence and image classifiers: classes, several labels at once, or values."""
    config = model.config
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        ours, theirs = (model(**inputs).logits, dense(**inputs).logits)
        sums.seen += len(ours)
        sums.values.append((ours.flatten().cpu(), theirs.flatten().cpu()))
    elif config.problem_type == "multi_label_classification":
        ours, theirs = (_precise(either(**inputs).logits).flatten() for either in (model, dense))
        labels = theirs.sigmoid()
        kl = F.binary_cross_entropy_with_logits(ours, labels, reduction="none")
        kl = kl - F.binary_cross_entropy_with_logits(theirs, labels, reduction="none")
        sums.add(len(ours), agreement=(ours > 0) == (theirs > 0), kl=kl)
    else:
        _classes(sums, model, dense, inputs)


def _by_mask(name: str) -> Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]:
    """The tokens that an attention mask does not exclude."""
    return lambda logits, inputs: logits[inputs[name].bool()] if name in inputs else logits.flatten(0, 1)


def _decoded(logits: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The tokens that a decoder reads, without padding."""
    return valid_tokens(logits, mask_of(inputs, decoded=True))


def _before_a_token(logits: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The positions that predict a token that is not padding."""
    mask = inputs.get("attention_mask")
    return logits[:, :-1].flatten(0, 1) if mask is None else logits[:, :-1][mask[:, 1:].bool()]


_classes = _distributions("logits", counted=lambda logits, inputs: logits)
_COMPARED: dict[str, _Compare] = {
    "ForSequenceClassification": _classified,
    "ForImageClassification": _classified,
    "ForAudioClassification": _classified,
    "ForMultipleChoice": _classes,
    "ForTokenClassification": _distributions("logits", counted=_by_mask("attention_mask")),
    "ForMaskedLM": _distributions("logits", counted=_by_mask("attention_mask")),
    "ForCausalLM": _distributions("logits", counted=_before_a_token),
    "ForConditionalGeneration": _distributions("logits", counted=_decoded),
    "ForQuestionAnswering": _distributions("start_logits", "end_logits", counted=lambda logits, inputs: logits),
}
