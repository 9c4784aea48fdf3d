"""The ways to run a forward pass that latency is measured in: eager, compiled, or replayed from a CUDA graph."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Models that are measured one after the other share their code, of which torch otherwise compiles only 8 versions.
COMPILED_VERSIONS = 1024

Pass = Callable[[], torch.Tensor]
Run = Callable[[Callable[..., Any]], torch.Tensor]


def validate_mode(mode: str, device: torch.device | None = None) -> None:
    """Checks that latency can be measured in a mode.

    Args:
        mode (`str`): One of `MODES`.
        device (`torch.device`, *optional*): Where; without it only the name is checked.

    Raises:
        ValueError: If there is no such mode, or the device has no CUDA graphs.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown latency mode '{mode}'; choose one of {', '.join(MODES)}.")
    if mode == "cuda_graphs" and device is not None and device.type != "cuda":
        raise ValueError(
            f"Latency mode 'cuda_graphs' needs a CUDA device, and the model runs on '{device}'. Measure on a CUDA "
            "device, or choose 'eager' or 'compiled'."
        )


def validate_precision(precision: str | None) -> None:
    """Checks that there is autocast to a precision.

    Raises:
        ValueError: If there is not.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"Unknown precision '{precision}'; choose bf16, fp16, or none for the model's own dtype.")


def forward_pass(
    model: PreTrainedModel, inputs: Mapping[str, Any], mode: str = "eager", precision: str | None = None
) -> Pass:
    """Makes a function that runs a model over some inputs and returns the first output.

    Call it within [`evaluating`]. In mode `"compiled"`, also within [`compiling`].

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        inputs (`Mapping[str, Any]`): One batch, on the model's device.
        mode (`str`, *optional*, defaults to `"eager"`): `"eager"`, `"compiled"` (`torch.compile`) or `"cuda_graphs"`
            (the kernels of an eager pass, started together).
        precision (`str`, *optional*): `"bf16"` or `"fp16"` for autocast; by default the model's own dtype.

    Raises:
        ValueError: If mode or precision are unknown, or the model cannot run in this mode.
    """
    validate_mode(mode, model.device)
    validate_precision(precision)
    device_type = model.device.type

    def run(network: Callable[..., Any]) -> torch.Tensor:
        dtype = None if precision is None else PRECISIONS[precision]
        with nullcontext() if dtype is None else torch.autocast(device_type, dtype):
            return network(**inputs)[0]

    return MODES[mode](model, run)


def _eager(model: PreTrainedModel, run: Run) -> Pass:
    return lambda: run(model)


def _compiled(model: PreTrainedModel, run: Run) -> Pass:
    network = torch.compile(model, dynamic=False)
    return lambda: run(network)


def _captured(model: PreTrainedModel, run: Run) -> Pass:
    """Captures one eager pass as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.device(model.device):
        # Libraries are set up in passes on a stream of their own, as torch's manual asks.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(model)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                output = run(model)
        except RuntimeError as error:
            raise ValueError(
                f"{type(model).__name__} cannot be captured as a CUDA graph: {error} Choose the latency mode "
                "'compiled' or 'eager'."
            ) from error

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


MODES: dict[str, Callable[[PreTrainedModel, Run], Pass]] = {
    "eager": _eager,
    "compiled": _compiled,
    "cuda_graphs": _captured,
}


@contextmanager
def compiling(mode: str) -> Iterator[None]:
    """In mode `"compiled"`, lets many models of one class be compiled, and forgets all compiled code afterwards.

    Models that were compiled before are then compiled again when they are next called.
    """
    if mode != "compiled":
        yield
        return
    import torch._dynamo.config as dynamo  # Takes seconds.

    try:
        with dynamo.patch(recompile_limit=COMPILED_VERSIONS, accumulated_recompile_limit=COMPILED_VERSIONS):
            yield
    finally:
        torch.compiler.reset()


def device_name(device: torch.device) -> str:
    """What a device is called in tables and reports, such as `"NVIDIA H100"` or `"cpu (AVX512, 2 threads)"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return device.type
