"""The loss of a model against its own outputs, which needs no labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..components.architectures import ARCHITECTURES
from ..tokens import mask_of
from .outputs import named_tensors, note_outputs


POOLINGS = ("mean", "cls", "last_token", "token")


@dataclass(frozen=True)
class SelfLoss:
    r"""The loss of a model against its own outputs, by its task.

    The Gauss-Newton matrix depends on labels only through the loss's Hessian in the outputs. That of softmax
    cross-entropy, of logistic loss and of squared error does not depend on labels at all. So this loss, in which the
    model's own outputs take the place of labels, has the same matrix:

    - classes (texts, images, sounds, choices, tokens, spans, the next token): cross-entropy to the own distribution;
    - several labels at once: logistic loss to the own probabilities;
    - values: squared error to the own values;
    - models without a head: squared distance of the embedding to itself, summed over its dimensions.

    Its gradient is zero, so methods that rank by gradients cannot use it.

    Args:
        pooling (`str`, *optional*): How a model without a head makes an embedding of its tokens: `"mean"` of those
            that are not padding, `"cls"` for the first, `"last_token"`, or `"token"` where each is an embedding. By
            default `"mean"` for texts and `"cls"` for images; towers with a projection pool tokens themselves.
        normalize (`bool`, *optional*, defaults to `True`): Whether embeddings are divided by their norm.

    Raises:
        ValueError: If the pooling is unknown; when it is called, if the model's task has no such loss.

    Example:

    ```python
    sensitivity = estimate_sensitivity(encoder, batches, loss_fn=SelfLoss(pooling="cls", normalize=False))
    ```
    """

    pooling: str | None = None
    normalize: bool = True

    def __post_init__(self):
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(f"Unknown pooling '{self.pooling}'; choose one of {', '.join(POOLINGS)}.")

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Runs a model on a batch, and returns the batch's mean loss with its graph."""
        return self.of_outputs(model, model(**inputs), inputs)

    def of_outputs(self, model: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The loss of what a model returned for a batch."""
        head = head_of(model)
        if head is None or head == "Model":
            embedding = self.embedding(model, outputs, inputs)
            loss = (embedding - embedding.detach()).square().sum(-1).mean()
            return note_outputs(loss, [embedding])
        if head not in _LOSSES:
            raise ValueError(
                f"{type(model).__name__} cannot be scored without labels: nothing is known of the outputs of a model "
                f"{head}. Give batches with labels, or pass loss_fn."
            )
        loss, used = _LOSSES[head](model, named_logits(model, outputs), inputs)
        return note_outputs(loss, used)

    def embedding(self, model: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The embeddings of a batch, shape `(examples, features)`, or `(tokens, features)` for `"token"`."""
        tokens = next(iter(named_tensors(outputs).values()))
        if tokens.ndim == 2 and self.pooling is None:  # Towers with a projection pool themselves.
            return F.normalize(tokens, dim=-1) if self.normalize else tokens
        if tokens.ndim != 3:
            raise ValueError(
                f"{type(model).__name__} returned no hidden states of tokens, but a tensor of the shape "
                f"{tuple(tokens.shape)}. It cannot be scored without labels. Give batches with labels, or a loss_fn."
            )
        mask = mask_of(inputs, decoded=bool(model.config.is_encoder_decoder))
        if not isinstance(mask, torch.Tensor) or mask.shape != tokens.shape[:2]:
            mask = tokens.new_ones(tokens.shape[:2])
        texts = model.main_input_name == "input_ids"
        pooled = _POOLED[self.pooling or ("mean" if texts else "cls")](tokens, mask)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def named_logits(model: PreTrainedModel, outputs: Any) -> dict[str, torch.Tensor]:
    """The logits among a model's outputs, by name.

    Raises:
        ValueError: If the outputs have no names.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"{type(model).__name__} returns a {type(outputs).__name__}, in which logits have no name. Without labels "
            "return a dictionary (config.return_dict=True)."
        )
    return {name: tensor for name, tensor in named_tensors(outputs).items() if "logits" in name}


def head_of(model: PreTrainedModel) -> str | None:
    """End of the name of a model's class in Transformers, such as `"ForMaskedLM"`, or `"Model"` without a head."""
    names = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    names = [name for name in names if hasattr(transformers, name)]
    heads = ["For" + name.rpartition("For")[2] for name in names if "For" in name]
    heads += ["ForCausalLM" for name in names if name.endswith("LMHeadModel")]
    bare = ["Model" for name in names if name.endswith("Model")]
    return next(iter([*heads, *bare]), None)


def needs_decoded(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder-decoder that generates, and does not decode what its encoder reads."""
    decoder = ARCHITECTURES[model.config.model_type].decoder if model.config.model_type in ARCHITECTURES else None
    if decoder is None or decoder.reads_inputs or head_of(model) not in ("Model", "ForConditionalGeneration"):
        return False
    return bool(model.config.is_encoder_decoder)


def validate_decoded(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Checks that a batch of an encoder-decoder that generates has something to decode.

    Raises:
        ValueError: If it has not.
    """
    if needs_decoded(model) and not {"labels", "decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        raise ValueError(
            f"{type(model).__name__} decodes, and a batch of {', '.join(sorted(inputs))} has nothing to decode. Give "
            "batches with `labels`, as DataCollatorForSeq2Seq makes them, or with `decoder_input_ids`."
        )


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, 0).amax(1)
    return tokens[torch.arange(len(tokens), device=mask.device), last]


_POOLED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "cls": lambda tokens, mask: tokens[:, 0],
    "last_token": _last,
    "token": lambda tokens, mask: tokens * mask[..., None].to(tokens.dtype),
}

_Loss = tuple[torch.Tensor, list[torch.Tensor]]


def _own_classes(logits: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy to the own distribution along the last dimension, the mean over the positions that count."""
    losses = -(logits.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1)
    if counts is None:
        return losses.mean()
    counts = counts.to(losses.dtype)
    return (losses * counts).sum() / counts.sum().clamp_min(1)


def _labels(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    """Of classifiers of texts, images and sounds: classes, several labels at once, or values."""
    z, config = logits["logits"], model.config
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return (z - z.detach()).square().mean(), [z]
    if config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(z, z.detach().sigmoid()), [z]
    return _own_classes(z), [z]


def _choices(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    return _own_classes(logits["logits"]), [logits["logits"]]


def _tokens(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    """Of all tokens that are not padding."""
    z, mask = logits["logits"], inputs.get("attention_mask")
    return _own_classes(z, mask if isinstance(mask, torch.Tensor) else z.new_ones(z.shape[:2])), [z]


def _next_tokens(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    """Of all tokens that come before one that is not padding."""
    z, mask = logits["logits"], inputs.get("attention_mask")
    counts = torch.zeros(z.shape[:2], device=z.device)
    counts[:, :-1] = mask[:, 1:] if isinstance(mask, torch.Tensor) else 1
    return _own_classes(z, counts), [z]


def _decoded_tokens(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    z, mask = logits["logits"], mask_of(inputs, decoded=True)
    masked = isinstance(mask, torch.Tensor) and mask.shape == z.shape[:2]
    return _own_classes(z, mask if masked else z.new_ones(z.shape[:2])), [z]


def _spans(model: PreTrainedModel, logits: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> _Loss:
    start, end = logits["start_logits"], logits["end_logits"]
    return (_own_classes(start) + _own_classes(end)) / 2, [start, end]


_LOSSES: dict[str, Callable[[PreTrainedModel, Mapping[str, torch.Tensor], Mapping[str, Any]], _Loss]] = {
    "ForSequenceClassification": _labels,
    "ForImageClassification": _labels,
    "ForImageClassificationWithTeacher": _labels,
    "ForAudioClassification": _labels,
    "ForMultipleChoice": _choices,
    "ForTokenClassification": _tokens,
    "ForMaskedLM": _tokens,
    "ForCausalLM": _next_tokens,
    "ForConditionalGeneration": _decoded_tokens,
    "ForQuestionAnswering": _spans,
}
