"""Measures the costs of a model: parameters, floating point operations and latency."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .components.architectures import config_of_layers, get_architecture
from .components.groups import layers
from .forward_modes import Pass, compiling, forward_pass
from .tokens import validate_length


def bf16_is_fast() -> bool:
    """Whether the device multiplies bfloat16 itself; where it is emulated, it takes ten times as long as float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def count_parameters(model: PreTrainedModel) -> int:
    """Counts a model's parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_encoder_parameters(model: PreTrainedModel) -> int:
    """Counts the layers' parameters, without embeddings and classifier; `budget="params"` removes a share of them."""
    return sum(p.numel() for p in {parameter for layer in layers(model) for parameter in layer.parameters()})


def example_inputs(model: PreTrainedModel, batch: int = 1, length: int = 128) -> dict[str, torch.Tensor]:
    """Makes inputs of the shape that a model accepts, for counting its FLOPs and measuring its latency.

    Args:
        model (`PreTrainedModel`): A model of texts, images or spectrograms.
        batch (`int`, *optional*, defaults to 1): Number of texts, images or spectrograms.
        length (`int`, *optional*, defaults to 128): Tokens per text, of encoder-decoders also of what they decode.

    Raises:
        ValueError: If the model takes other inputs than texts, images and spectrograms, or only shorter texts.
    """
    config, name = config_of_layers(model, get_architecture(model)), model.main_input_name
    floats: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    if name == "pixel_values":
        # Convolutional networks take images of any size; few configs name one.
        size = getattr(config, "image_size", 224)
        size = size if isinstance(size, list | tuple) else [size] * 2
        return {name: torch.zeros(batch, config.num_channels, *size, **floats)}
    if name == "input_features":  # Whisper's encoder takes spectrograms of a fixed length.
        inputs = {name: torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, **floats)}
    elif name == "input_ids":
        validate_length(model, length)
        # No token is padding. The last one is the end of the sentence, if the model has such a token.
        ids = torch.full((batch, length), min(5, config.vocab_size - 1), device=model.device)
        end = getattr(config, "eos_token_id", None)
        end = end[0] if isinstance(end, list) else end
        if end is not None and 0 < end < config.vocab_size:  # A smaller vocabulary may not have that of the type.
            ids[:, -1] = end
        inputs = {name: ids, "attention_mask": torch.ones_like(ids)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes '{name}'; only models of texts, images and spectrograms can be measured."
        )
    if config.is_encoder_decoder and type(model).__name__.endswith(("Model", "ForConditionalGeneration")):
        # Other models derive decoder inputs from the encoder's.
        decoded = min(length, getattr(config, "max_target_positions", length))
        inputs["decoder_input_ids"] = torch.full((batch, decoded), min(5, config.vocab_size - 1), device=model.device)
        inputs["decoder_input_ids"][:, 0] = config.decoder_start_token_id or 0
    return inputs


def count_flops(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """Counts the floating point operations of one forward pass over `inputs`, by `torch.utils.flop_counter`.

    The counter counts matrix products, two operations per multiply-add. Attention runs with the math kernel, because
    fused kernels do not report their operations on every device.
    """
    return _count_flops(model, lambda: model(**inputs))


def count_flops_by_module(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[nn.Module, int]:
    """Counts FLOPs as `count_flops` does, for each module including its submodules."""
    counts = _counter(model, lambda: model(**inputs)).get_flop_counts()
    root = type(model).__name__
    names = {f"{root}.{name}".removesuffix("."): module for name, module in model.named_modules()}
    return {module: sum(counts[name].values()) for name, module in names.items() if name in counts}


def _count_flops(model: PreTrainedModel, forward: Callable[[], Any]) -> int:
    return _counter(model, forward).get_total_flops()


def _counter(model: PreTrainedModel, forward: Callable[[], Any]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    # The counter fails if a parameter that requires gradients is passed to a module, as DeBERTa's positions are.
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Or a view of embeddings that require gradients for gradient checkpointing, as BART's positions are.
    embeddings_do = "_require_grads_hook" in vars(model)
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            if embeddings_do:
                model.disable_input_require_grads()
            with counter:
                forward()
        finally:
            for parameter in required:
                parameter.requires_grad_(True)
            if embeddings_do:
                model.enable_input_require_grads()
    return counter


def compare_latency(
    models: Mapping[str, PreTrainedModel],
    inputs: Mapping[str, Any],
    repeats: int = 15,
    *,
    mode: str = "eager",
    precision: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measures the median seconds of a forward pass of each model over the same inputs.

    The models take turns, so that a drift of the machine's speed affects all of them equally.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by name.
        inputs (`Mapping[str, Any]`): One batch, on the models' device.
        repeats (`int`, *optional*, defaults to 15): Timed passes per model, after two warm-up passes.
        mode (`str`, *optional*, defaults to `"eager"`): `"eager"`, `"compiled"` (`torch.compile`) or `"cuda_graphs"`.
        precision (`str`, *optional*): `"bf16"` or `"fp16"` for autocast; by default the models' own dtype.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar, on a terminal.

    Returns:
        `dict[str, float]`: Seconds by name.

    Raises:
        ValueError: If mode or precision are unknown, or a model cannot run in this mode.
    """
    with ExitStack() as stack:
        stack.enter_context(compiling(mode))
        for model in models.values():
            stack.enter_context(evaluating(model))
        passes = {name: forward_pass(model, inputs, mode, precision) for name, model in models.items()}
        seconds = take_turns(passes, repeats, progress=progress)
    return {name: statistics.median(values) for name, values in seconds.items()}


def take_turns(passes: Mapping[str, Pass], repeats: int, *, progress: bool = False) -> dict[str, list[float]]:
    """Measures the seconds of forward passes, in rounds in which each runs once, after two rounds of warming up.

    Args:
        passes (`Mapping[str, Pass]`): What [`forward_pass`] returned, by name.
        repeats (`int`): Timed rounds.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar, on a terminal.

    Returns:
        `dict[str, list[float]]`: The seconds of every round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in tqdm(range(repeats + 2), "Measuring latency", disable=None if progress else True):
        for name, run in passes.items():
            start = time.perf_counter()
            run().sum().item()  # Waits for an accelerator to finish.
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_costs(model: PreTrainedModel, forward: Callable[[], torch.Tensor] | None = None) -> dict[str, float]:
    """Counts parameters, and measures `forward`: its FLOPs, and the median milliseconds of three calls.

    Args:
        model (`PreTrainedModel`): The model.
        forward (`Callable`, *optional*): Runs the model and returns a tensor. Without it only parameters are counted.
    """
    parameters: dict[str, float] = {
        "parameters": count_parameters(model),
        "encoder_parameters": count_encoder_parameters(model),
    }
    if forward is None:
        return parameters
    seconds = []
    with evaluating(model):
        for _ in range(4):
            start = time.perf_counter()
            forward().sum().item()  # Waits for an accelerator to finish.
            seconds.append(time.perf_counter() - start)
    latency = 1000 * statistics.median(seconds[1:])
    return {**parameters, "flops": _count_flops(model, forward), "latency_ms": latency}


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients, and restores its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
