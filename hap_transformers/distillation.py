"""The loss that draws a pruned model to the dense one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .tokens import valid_tokens


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, labels: torch.Tensor | None = None
) -> torch.Tensor:
    r"""How far logits are from the dense model's: T^2 KL(softmax(teacher / T) || softmax(student / T)).

    After Hinton et al., [arXiv 1503.02531](https://arxiv.org/abs/1503.02531). A single output is a regression, whose
    distance is half its squared error.

    Args:
        student (`torch.Tensor`): Logits, shape `(..., classes)`.
        teacher (`torch.Tensor`): Logits of the dense model, of the same shape.
        temperature (`float`): T.
        labels (`torch.Tensor`, *optional*): Where they have the shape of the logits' positions, positions labelled
            -100 do not count.

    Returns:
        `torch.Tensor`: The mean over positions.
    """
    if labels is not None and labels.shape == student.shape[:-1]:
        student, teacher = student[labels != -100], teacher[labels != -100]
    student, teacher = student.flatten(0, -2).float(), teacher.flatten(0, -2).float()
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher) / 2
    logs = [(logits / temperature).log_softmax(-1) for logits in (student, teacher)]
    return temperature**2 * F.kl_div(*logs, log_target=True, reduction="batchmean")


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
    """Hidden states of the layers that are pruned: of encoder-decoders the encoder's."""
    return outputs["encoder_hidden_states"] if "encoder_hidden_states" in outputs else outputs["hidden_states"]
