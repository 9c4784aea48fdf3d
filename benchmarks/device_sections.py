"""The sections of `benchmarks.device`: each takes a device and the sizes of its workloads, and yields rows."""

import importlib.util
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hap_transformers
from hap_transformers import METHODS, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.efficiency import compare_latency, count_flops, count_parameters
from hap_transformers.forward_modes import device_name
from hap_transformers.refit.dense_copy import sharing_copy
from hap_transformers.sensitivity.methods import Finished
from hap_transformers.sensitivity.statistics import SampleMoments
from hap_transformers.sensitivity.task import ScoringTask

from . import latency as cpu_latency
from . import workloads


PRECISIONS = {"fp32": None, "bf16": "bf16", "fp16": "fp16"}
RATIO = 0.6
SHARES = (0.6, 0.8)
PROMISED_SHARES = (0.4, 0.6)


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are.

    Args:
        bert (`dict`): Fields of a `BertConfig` with 12 heads.
        batch (`int`): Texts a batch.
        length (`int`): Tokens a text.
        examples (`dict[int, float | None]`): Numbers of examples to prune with, each with the most seconds that all
            phases should take.
        scored (`int`): Batches for the passes of scoring.
        repeats (`int`): Timed rounds.
        llama (`dict`): Fields of a `LlamaConfig`.
        llama_batches (`tuple[int, int, int]`): Number of batches, texts a batch, tokens a text.
        max_memory (`int`): Bytes for the sums of the Llama's scores.
        latency_batches (`tuple[int, ...]`): Batch sizes that latency is measured at.
        promised (`tuple[tuple[str, str, int], ...]`): Dtypes, modes and batch sizes of plans by latency.
        promised_seconds (`float`): Of measuring each of their models.
        generation_batches (`tuple[int, ...]`): Batch sizes that generation is measured at.
        generated (`tuple[int, int]`): Tokens of a prompt, and tokens that are generated.
    """

    bert: dict
    batch: int
    length: int
    examples: dict[int, float | None]
    scored: int
    repeats: int
    llama: dict
    llama_batches: tuple[int, int, int]
    max_memory: int
    latency_batches: tuple[int, ...]
    promised: tuple[tuple[str, str, int], ...]
    promised_seconds: float
    generation_batches: tuple[int, ...]
    generated: tuple[int, int]


FULL = Sizes(
    bert={},
    batch=32,
    length=128,
    examples={512: 5.0, 2048: None},
    scored=4,
    repeats=5,
    llama={
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    llama_batches=(8, 1, 512),
    max_memory=8 * 10**9,
    latency_batches=(1, 8, 32, 256),
    promised=(("float32", "eager", 32), ("bfloat16", "eager", 32), ("bfloat16", "cuda_graphs", 32)),
    promised_seconds=1.0,
    generation_batches=(1, 8, 32),
    generated=(512, 65),
)
SMALL = Sizes(
    bert={"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 1000},
    batch=4,
    length=8,
    examples={8: 5.0, 16: None},
    scored=2,
    repeats=1,
    llama={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
    llama_batches=(2, 1, 16),
    max_memory=300_000,
    latency_batches=(1, 2),
    promised=(("float32", "eager", 2),),
    promised_seconds=0.1,
    generation_batches=(1, 2),
    generated=(8, 4),
)


@dataclass
class Stopwatch:
    """Seconds and peak memory of phases that follow each other.

    Args:
        device (`torch.device`): Where they run.
        seconds (`dict[str, float]`): Seconds by phase.
        bytes (`dict[str, int]`): The most bytes of tensors at once, by phase. Only GPUs count them.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Adds what has run since the last lap to a phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.bytes[phase] = max(peak, self.bytes.get(phase, 0))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - self.last
        self._start()


def make_batches(
    device: torch.device, vocabulary: int, shape: tuple[int, int, int], causal: bool = False
) -> workloads.Batches:
    """Makes batches of random tokens, with labels of two classes, or the tokens themselves."""
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    classes = torch.arange(shape[1], device=device) % 2
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if causal else classes}
        for ids in tokens
    ]


def bert(device: torch.device, sizes: Sizes, examples: int) -> tuple[PreTrainedModel, workloads.Batches]:
    """Makes a classifier of BERT's shape with random weights, and batches for it."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes.bert | {"num_attention_heads": 12})).eval().to(device)
    shape = examples // sizes.batch, sizes.batch, sizes.length
    return model, make_batches(device, model.config.vocab_size, shape)


def machine(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Says what everything runs on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda or ""}
    versions |= {"transformers": transformers.__version__, "hap_transformers": hap_transformers.__version__}
    row = {"card": device_name(device), **versions}
    if device.type == "cuda":
        row["GiB"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f}"
    yield row


def prune(model: PreTrainedModel, batches: workloads.Batches, max_memory: int | None = None) -> Stopwatch:
    """Prunes a model in place, and measures each phase."""
    watch, kronecker = Stopwatch(model.device), METHODS["kronecker"]

    def settle(task: ScoringTask, moments: SampleMoments, progress: bool) -> Finished:
        watch.lap("passes")
        found = kronecker.settle(task, moments, progress)
        watch.lap("elimination")
        return found

    with workloads.kronecker_with(settle=settle) as method:
        sensitivity = estimate_sensitivity(model, batches, method, max_memory=max_memory, progress=False)
    watch.lap("passes")
    plan = plan_pruning(sensitivity, model, ratio=RATIO)
    watch.lap("plan")
    dense = sharing_copy(model)
    apply_plan(model, plan)
    watch.lap("surgery")
    reconstruct(model, dense, batches, progress=False)
    watch.lap("refit")
    return watch


def phases_row(name: str, work: str, target: float | None, runs: list[Stopwatch]) -> dict:
    """A line of the table of phases: medians of the seconds, the most memory."""
    seconds = {phase: statistics.median(run.seconds[phase] for run in runs) for phase in runs[0].seconds}
    peak = {phase: max(run.bytes[phase] for run in runs) for phase in runs[0].bytes}
    return {"model": name, "work": work, "target": target, "runs": len(runs), "seconds": seconds, "bytes": peak}


def phases(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Measures the phases of pruning a model of BERT-base's shape."""
    model, batches = bert(device, sizes, max(sizes.examples))
    prune(deepcopy(model), batches[:1])  # Loads the kernels.
    for examples, target in sizes.examples.items():
        repeats = sizes.repeats // 2 + 1 if target else 1
        runs = [prune(deepcopy(model), batches[: examples // sizes.batch]) for _ in range(repeats)]
        yield phases_row("BERT-base", f"{examples:,} x {sizes.length} tokens", target, runs)


def llama(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Measures the phases of pruning a Llama shape; a text's labels are its tokens."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**sizes.llama)).eval()
    count, texts, length = sizes.llama_batches
    batches = make_batches(device, model.config.vocab_size, sizes.llama_batches, causal=True)
    name = f"Llama, {count_parameters(model) / 1e9:.1f} billion"
    run = prune(model, batches, sizes.max_memory)
    yield phases_row(name, f"{count * texts:,} x {length} tokens", 180.0, [run])


def rounds(contenders: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, dict]:
    """Measures rounds in which every contender runs once; the first round warms up."""
    found: dict[str, dict] = {name: {"seconds": [], "MiB": []} for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            watch = Stopwatch(device)
            contender()
            watch.lap(name)
            if repeat:
                found[name]["seconds"].append(watch.seconds[name])
                found[name]["MiB"].append(watch.bytes.get(name, 0) / 2**20)
    return found


def ratio_row(measure: str, target: float | None, over: dict, under: dict, unit: str = "s") -> dict:
    """A line of the table of ratios: of seconds in the same round, or of peak memory."""
    both = [runs["seconds" if unit == "s" else unit] for runs in (over, under)]
    ratios = [a / b for a, b in zip(*both, strict=True)]
    spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    values = [statistics.median(runs) for runs in both]
    return {"measure": measure, "target": target, **spread, "values": values, "unit": unit}


def passes(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Compares the passes of all methods with forward+backward of the same batches in the same precision."""
    model, batches = bert(device, sizes, sizes.scored * sizes.batch)
    for name, precision in PRECISIONS.items():
        with workloads.kronecker_with(settle=None) as kronecker:
            methods = {"gradient": None, "fisher": None, "gauss_newton_trace": 1.1, kronecker: 1.1}
            score = partial(estimate_sensitivity, model, batches, precision=precision, progress=False)
            contenders: dict[str, Callable[[], object]] = {method: partial(score, method) for method in methods}
            contenders["reference"] = partial(workloads.forward_backward, model, batches, precision)
            found = rounds(contenders, device, sizes.repeats)
        for method, target in methods.items():
            label = "kronecker, passes" if method == kronecker else method
            measure = f"{label} / forward+backward, {name}"
            yield ratio_row(measure, target, found[method], found["reference"])
            if device.type == "cuda" and target:
                yield ratio_row(f"peak memory, {measure}", None, found[method], found["reference"], "MiB")


def hutchinson(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Compares four probes of the Hessian in each precision with each other and with PyHessian."""
    model, batches = bert(device, sizes, sizes.batch)
    contenders: dict[str, Callable[[], object]] = {
        name: partial(workloads.hutchinson, model, batches, precision) for name, precision in PRECISIONS.items()
    }
    pairs = [("bf16", "fp32", 0.6), ("fp16", "bf16", 1.0), ("fp16", "fp32", None)]
    if importlib.util.find_spec("pyhessian"):
        contenders["PyHessian"] = partial(workloads.pyhessian, model, batches)
        pairs += [("fp32", "PyHessian", 0.8), ("bf16", "PyHessian", None)]
    else:
        yield {"note": "PyHessian is not installed, so hessian_trace was not compared with it."}
    found = rounds(contenders, device, sizes.repeats)
    for over, under, target in pairs:
        measure = f"hessian_trace {over} / {under}"
        yield ratio_row(measure, target, found[over], found[under])
        if device.type == "cuda":
            yield ratio_row(f"peak memory, {measure}", None, found[over], found[under], "MiB")


def encoder(device: torch.device, sizes: Sizes, dtype: torch.dtype) -> BertModel:
    """Makes an encoder of BERT's shape for inference."""
    torch.manual_seed(0)
    config = BertConfig(**{"vocab_size": 1000, **sizes.bert, "num_attention_heads": 12})
    return BertModel(config).to(device, dtype).eval()


def make_inputs(device: torch.device, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Makes a batch of random tokens on a device."""
    return {name: tensor.to(device) for name, tensor in cpu_latency.make_inputs(batch, length).items()}


@torch.inference_mode()
def latency(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Measures models that have lost the same share of every layer, in heads and neurons, against the dense one."""
    modes = ("eager", "cuda_graphs") if device.type == "cuda" else ("eager",)
    for mode, dtype in itertools.product(modes, (torch.float32, torch.bfloat16)):
        dense, one = encoder(device, sizes, dtype), make_inputs(device, 1, sizes.length)
        models = {"dense": dense, **{f"{share:.0%}": cpu_latency.pruned(dense, one, share) for share in SHARES}}
        flops = {name: count_flops(model, one) for name, model in models.items()}
        ideal = {name: flops["dense"] / count for name, count in flops.items() if name != "dense"}
        for batch in sizes.latency_batches:
            inputs = make_inputs(device, batch, sizes.length)
            seconds = compare_latency(models, inputs, 3 * sizes.repeats, mode=mode)
            faster = {name: seconds["dense"] / seconds[name] for name in ideal}
            row = {"dtype": str(dtype).removeprefix("torch."), "batch_size": batch, "length": sizes.length}
            yield {**row, "mode": mode, "dense_ms": 1000 * seconds["dense"], "faster": faster, "ideal": ideal}


@torch.inference_mode()
def promises(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Measures what of the latency that plans promise their models keep."""
    for dtype, mode, batch in sizes.promised:
        dense, inputs = encoder(device, sizes, getattr(torch, dtype)), make_inputs(device, batch, sizes.length)
        for row in cpu_latency.promises(dense, inputs, PROMISED_SHARES, sizes.promised_seconds, mode):
            yield {"model": f"BERT-base, {dtype}, {mode}", **row}
