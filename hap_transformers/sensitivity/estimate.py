"""`estimate_sensitivity`: the one entry to all scoring methods."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import AttentionBlock, attention_blocks
from .batches import LossFunction, model_loss, scored_batches
from .gradient import gradient
from .hutchinson import hessian_trace
from .report import Sensitivity


logger = logging.get_logger(__name__)

# Below this split-half reliability more than half of the variance in ranks is noise.
RELIABLE = 0.5

METHODS = {"hessian_trace": hessian_trace, "gradient": gradient}


def estimate_sensitivity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    method: str = "hessian_trace",
    *,
    num_probes: int = 4,
    max_examples: int | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures how much each attention head matters to a model's loss.

    Dropout is off while scoring. The model comes back as it was: mode, `requires_grad`, `.grad` and hooks.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, unwrapped (not DDP).
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs with labels, such as a `DataLoader` gives.
        method (`str`, *optional*, defaults to `"hessian_trace"`): `"hessian_trace"` (HAP's relative Hessian trace by
            Hutchinson's method) or `"gradient"` (Michel et al.'s mask gradients).
        num_probes (`int`, *optional*, defaults to 4): Random probes a batch, for methods that draw any.
        max_examples (`int`, *optional*): Stop after this many examples.
        seed (`int`, *optional*, defaults to 0): Seed of the probes. The global random state is neither read nor moved.
        loss_fn (`Callable`, *optional*): Takes the model and a batch, returns the batch's mean loss. By default the
            model's own loss.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Sensitivity`: Scores of the heads that are left, one tensor a layer.

    Raises:
        ValueError: If the architecture or the method is unknown, `num_probes` or `max_examples` is not positive, there
            are no examples or no labels, or a loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown sensitivity method '{method}'; choose one of {', '.join(METHODS)}.")
    for name, value in (("num_probes", num_probes), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    start = time.perf_counter()
    blocks = attention_blocks(model)
    scored = [block for block in blocks if block.num_heads]
    if not scored:
        raise ValueError(f"{type(model).__name__} has no attention heads left to score.")
    bar = tqdm(batches, desc=f"Scoring heads ({method})", disable=None if progress else True, leave=False)
    generator = torch.Generator().manual_seed(seed)
    with _scoring_mode(model, scored), bar:
        data = scored_batches(bar, next(model.parameters()).device, max_examples)
        result = METHODS[method](model, scored, data, loss_fn or model_loss, num_probes, generator)
    for field in ("heads", "head_traces", "head_stderr"):
        setattr(result, field, _for_all_layers(blocks, getattr(result, field)))
    result.seconds = time.perf_counter() - start
    if result.reliability is not None and result.reliability < RELIABLE:
        logger.warning(
            f"The ranking of heads is not resolved: its reliability is {result.reliability:.2f}, where 1 is a ranking "
            "that another sample would repeat and 0 is noise. Raise num_probes or max_examples."
        )
    return result


def _for_all_layers(blocks: list[AttentionBlock], tensors: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
    """Puts an empty tensor where a layer has no heads left."""
    if tensors is None:
        return None
    remaining = iter(tensors)
    return [next(remaining) if block.num_heads else torch.zeros(0, dtype=torch.float64) for block in blocks]


@contextmanager
def _scoring_mode(model: PreTrainedModel, blocks: list[AttentionBlock]) -> Iterator[None]:
    """Turns dropout off and gradients on for what is scored, and nothing else; puts everything back afterwards."""
    training = [module for module in model.modules() if module.training]
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    scored = {parameter for block in blocks for parameter, _ in block.head_parameters()}
    model.eval()
    for parameter in required:
        parameter.requires_grad_(parameter in scored)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, value in required.items():
            parameter.requires_grad_(value)
