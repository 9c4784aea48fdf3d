"""Losses that train a pruned model to follow the dense one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..tokens import counted, mask_of, relative_distance, valid_tokens


def distillation_loss(
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    temperature: float,
    *,
    problem_type: str | None = None,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    shifted: bool = False,
) -> torch.Tensor:
    r"""Distance of a model's logits from the dense model's: T^2 KL(softmax(teacher / T) || softmax(student / T)).

    See Hinton et al., [arXiv 1503.02531](https://arxiv.org/abs/1503.02531). For a regression the distance is half the
    squared error. For multi-label classification it is the same divergence between the sigmoids.

    Args:
        student (`Mapping[str, torch.Tensor]`): Logits of the pruned model by name, shapes `(..., classes)`, or
            `(batch,)` of models with a single output.
        teacher (`Mapping[str, torch.Tensor]`): Logits of the dense model, by the same names.
        temperature (`float`): T.
        problem_type (`str`, *optional*): The `problem_type` of the model's config. A model with a single output counts
            as a regression.
        labels (`torch.Tensor`, *optional*): If their shape is that of the logits without classes, positions labelled
            -100 do not count, unless labels are floats.
        mask (`torch.Tensor`, *optional*): If there are no labels and its shape is that of the logits without classes,
            positions where it is zero (padding) do not count.
        shifted (`bool`, *optional*, defaults to `False`): Whether the logits at a position predict the label of the
            next position, as in causal language models.

    Returns:
        `torch.Tensor`: The mean over positions, then over the outputs with logits.

    Raises:
        ValueError: If there are no logits.
    """
    if not student:
        raise ValueError("Nothing to distil: the model's outputs have no logits. Set distillation=0.")
    losses = []
    given = counted(labels) if labels is not None else None if mask is None else mask.bool()
    for name in student:
        logits, target = student[name].float(), teacher[name].float()
        kind = problem_type
        integers = labels is not None and labels.shape == logits.shape and not labels.is_floating_point()
        if integers and problem_type is None and (logits.ndim == 1 or logits.shape[-1] > 1):
            # Each token, or example, has one yes-or-no label, as in ELECTRA's pretraining.
            logits, target, kind = logits[..., None], target[..., None], "multi_label_classification"
        elif logits.ndim == 1:
            logits, target = logits[:, None], target[:, None]
        if given is not None and given.shape == logits.shape[:-1]:
            chosen = given
            if shifted:
                logits, target, chosen = logits[:, :-1], target[:, :-1], given[:, 1:]
            logits, target = logits[chosen], target[chosen]
        logits, target = logits.flatten(0, -2), target.flatten(0, -2)
        losses.append(_distance(logits, target, temperature, kind) if len(logits) else logits.sum())
    return torch.stack(losses).mean()


def _distance(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, problem_type: str | None
) -> torch.Tensor:
    """Distance of the student's logits from the teacher's, each `(positions, classes)`."""
    if problem_type == "multi_label_classification":
        probabilities = (teacher / temperature).sigmoid()
        scaled = [F.binary_cross_entropy_with_logits(z / temperature, probabilities) for z in (student, teacher)]
        return temperature**2 * (scaled[0] - scaled[1])
    if problem_type == "regression" or student.shape[-1] == 1:
        return F.mse_loss(student, teacher) / 2
    student_logs, teacher_logs = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student_logs, teacher_logs, log_target=True, reduction="batchmean")


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Half the squared distance between normalized embeddings, which is one minus their cosine, averaged over rows.

    Args:
        student (`torch.Tensor`): The pruned model's embeddings, shape `(examples, features)`, of any length.
        teacher (`torch.Tensor`): The dense model's embeddings, of the same shape.
    """
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def hidden_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """Relative squared distance of a model's hidden states from the dense model's, averaged over layers.

    Each layer's mean squared distance is divided by the mean square of the dense model's hidden states.

    Args:
        student (`Sequence[torch.Tensor]`): The pruned model's hidden states, each `(batch, tokens, features)`.
        teacher (`Sequence[torch.Tensor]`): The dense model's hidden states, of the same shapes.
        mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, zero for padding.
    """
    distances = []
    for pair in zip(student, teacher, strict=True):
        states, target = (valid_tokens(hidden.float(), mask) for hidden in pair)
        distances.append(relative_distance(states, target))
    return torch.stack(distances).mean()


def hidden_distance(student: Any, teacher: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The [`hidden_loss`] of all layers, in encoder-decoders of both parts.

    Args:
        student (`Any`): Outputs of the pruned model.
        teacher (`Any`): Outputs of the dense model.
        inputs (`Mapping[str, Any]`): The batch, which says what is padding.

    Raises:
        ValueError: If the outputs have no hidden states.
    """
    states = [hidden_states(outputs) for outputs in (student, teacher)]
    losses = []
    for name, own in states[0].items():
        mask = mask_of(inputs, decoded=name == "decoder_hidden_states")
        losses.append(len(own) * hidden_loss(own, states[1][name], mask))
    return torch.stack(losses).sum() / sum(map(len, states[0].values()))


def hidden_states(outputs: Any) -> dict[str, Sequence[torch.Tensor]]:
    """Returns the hidden states of the layers that are pruned, by name; encoder-decoders have two.

    Raises:
        ValueError: If the outputs have no hidden states.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"The model returns a {type(outputs).__name__}, in which hidden states have no name. Return a dictionary "
            "(config.return_dict=True), or set distillation_hidden=0."
        )
    names = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    found = {name: outputs[name] for name in names if outputs.get(name) is not None}
    if not found:
        raise ValueError(f"The model's outputs {sorted(outputs)} have no hidden states. Set distillation_hidden=0.")
    return found
