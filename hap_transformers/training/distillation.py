"""The loss that draws a pruned model to the dense one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..tokens import valid_tokens


def distillation_loss(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    temperature: float,
    *,
    problem_type: str | None = None,
    labels: torch.Tensor | None = None,
    shifted: bool = False,
) -> torch.Tensor:
    r"""How far a model's logits are from the dense model's: T^2 KL(softmax(teacher / T) || softmax(student / T)).

    After Hinton et al., [arXiv 1503.02531](https://arxiv.org/abs/1503.02531). Of a regression it is half the squared
    error; of several labels at once the same divergence between the sigmoids.

    Args:
        student (`Mapping[str, Any]`): Outputs; those with "logits" in their name count, shapes `(..., classes)`.
        teacher (`Mapping[str, Any]`): Outputs of the dense model.
        temperature (`float`): T.
        problem_type (`str`, *optional*): As in the model's config. A single output is a regression.
        labels (`torch.Tensor`, *optional*): Where they have the shape of the logits' positions, positions labelled
            -100 do not count.
        shifted (`bool`, *optional*, defaults to `False`): Whether labels are those of the position before, as in
            causal language models.

    Returns:
        `torch.Tensor`: The mean over positions, and over outputs.

    Raises:
        ValueError: If there are no logits, or outputs have no names.
    """
    if isinstance(student, tuple):
        raise ValueError("The model returns tuples, whose logits have no name. Set config.return_dict to True.")
    names = [name for name, value in student.items() if "logits" in name and torch.is_floating_point(value)]
    if not names:
        raise ValueError(
            f"Nothing to distil: the model's outputs {sorted(student)} have no logits. Set distillation=0."
        )
    losses = []
    for name in names:
        own, target = student[name].float(), teacher[name].float()
        kind = problem_type
        whole = labels is not None and labels.shape == own.shape and not labels.is_floating_point()
        if whole and problem_type is None and own.shape[-1] > 1:
            # A question of yes or no for each token, as ELECTRA is pretrained on.
            own, target, kind = own[..., None], target[..., None], "multi_label_classification"
        if labels is not None and labels.shape == own.shape[:-1]:
            counted = labels != -100
            if shifted:
                own, target, counted = own[:, :-1], target[:, :-1], counted[:, 1:]
            own, target = own[counted], target[counted]
        own, target = own.flatten(0, -2), target.flatten(0, -2)
        losses.append(_distance(own, target, temperature, kind) if len(own) else own.sum())
    return torch.stack(losses).mean()


def _distance(own: torch.Tensor, target: torch.Tensor, temperature: float, problem_type: str | None) -> torch.Tensor:
    """The distance of logits, each `(positions, classes)`."""
    if problem_type == "multi_label_classification":
        probabilities = (target / temperature).sigmoid()
        scaled = [F.binary_cross_entropy_with_logits(z / temperature, probabilities) for z in (own, target)]
        return temperature**2 * (scaled[0] - scaled[1])
    if problem_type == "regression" or own.shape[-1] == 1:
        return F.mse_loss(own, target) / 2
    own_logs, target_logs = ((logits / temperature).log_softmax(-1) for logits in (own, target))
    return temperature**2 * F.kl_div(own_logs, target_logs, log_target=True, reduction="batchmean")


def hidden_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean over layers of the squared distance of hidden states, over the mean square of the dense model's.

    Args:
        student (`Sequence[torch.Tensor]`): Hidden states of every layer, each `(batch, tokens, features)`.
        teacher (`Sequence[torch.Tensor]`): Those of the dense model.
        mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, zero for padding.
    """
    distances = []
    for own, target in zip(student, teacher, strict=True):
        own, target = (valid_tokens(states.float(), mask) for states in (own, target))
        distances.append(F.mse_loss(own, target) / target.square().mean())
    return torch.stack(distances).mean()


def hidden_states(outputs: ModelOutput | Mapping[str, Any]) -> Sequence[torch.Tensor]:
    """Hidden states of the layers that are pruned: of encoder-decoders the encoder's.

    Raises:
        ValueError: If there are none.
    """
    for name in ("encoder_hidden_states", "hidden_states"):
        if name in outputs:
            return outputs[name]
    raise ValueError(f"The model's outputs {sorted(outputs)} have no hidden states. Set distillation_hidden=0.")
