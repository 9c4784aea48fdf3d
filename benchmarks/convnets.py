"""Measures what pruning a ResNet-50 and a ConvNeXt of ImageNet's shape costs, and how much faster they get.

    python -m benchmarks.convnets

Weights and images are random: time depends on shapes alone. Nothing else should run on the machine. The command prints
a table and writes JSON.
"""

import json
import platform
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hap_transformers import apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.efficiency import compare_latency, count_encoder_parameters, count_flops, example_inputs


HERE = Path(__file__).parent
MODELS = {
    "ResNet-50": (ResNetForImageClassification, ResNetConfig),
    "ConvNeXt-T": (ConvNextForImageClassification, ConvNextConfig),
}
# Seconds that pruning should take at most on two cores, and the share of the ideal speed-up that should be reached.
SECONDS, SHARE = 300.0, 0.8
SIZE = 224


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str = str(HERE / "convnets.json")
    models: list[str] = field(default_factory=lambda: list(MODELS))
    images: int = 128
    batch: int = 8
    ratio: float = 0.6
    rounds: int = 9
    image_size: int = SIZE


def make(name: str, **sizes: Any) -> PreTrainedModel:
    """A network with random weights."""
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    return model_class(config_class(num_labels=1000, **sizes)).eval()


def measure(name: str, args: Arguments, **sizes: Any) -> dict[str, Any]:
    """Prunes a network, and returns the seconds of each phase, its FLOPs and its time over the dense one's."""
    dense, generator = make(name, **sizes), torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.image_size, args.image_size)
    batches = [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(args.images // args.batch)]
    smaller, times = deepcopy(dense), [time.perf_counter()]
    scores = estimate_sensitivity(smaller, batches, progress=False)
    times.append(time.perf_counter())
    apply_plan(smaller, plan_pruning(scores, smaller, ratio=args.ratio))
    times.append(time.perf_counter())
    reconstruct(smaller, dense, batches, progress=False)
    times.append(time.perf_counter())
    inputs = example_inputs(dense, args.batch) | {"pixel_values": batches[0]["pixel_values"]}
    seconds = compare_latency({"dense": dense, "pruned": smaller}, inputs, args.rounds)
    phases = zip(("score", "plan and surgery", "refit"), times, times[1:], strict=False)
    return {
        "model": name,
        "parameters": count_encoder_parameters(smaller) / count_encoder_parameters(dense),
        "flops": count_flops(smaller, inputs) / count_flops(dense, inputs),
        "time": seconds["pruned"] / seconds["dense"],
        "seconds": {phase: round(end - start, 2) for phase, start, end in phases},
    }


def convnets_table(result: dict[str, Any]) -> str:
    """Formats the results."""
    lines = [
        "| network | score, s | refit, s | together, s | at most | parameters | FLOPs | time | of ideal | at least |",
        "| " + " | ".join(["---"] * 10) + " |",
    ]
    for row in result["rows"]:
        spent, shares = row["seconds"], [f"{100 * row[name]:.0f} %" for name in ("parameters", "flops", "time")]
        figures = [f"{spent['score']:.0f}", f"{spent['refit']:.0f}", f"{sum(spent.values()):.0f}", f"{SECONDS:.0f}"]
        ideal = f"{row['flops'] / row['time']:.2f}"
        lines.append(f"| {' | '.join([row['model'], *figures, *shares, ideal, f'{SHARE:.2f}'])} |")
    return "\n".join(lines)


def describe_convnets(result: dict[str, Any]) -> str:
    """Says how the figures were measured."""
    size, shown = result["image_size"], f"{result['images']} random images"
    return (
        f"{100 * result['ratio']:.0f} % of the blocks' parameters are removed by `kronecker`, on {shown} of "
        f"{size}x{size} pixels without labels, on which the rest is refitted. Parameters are those of the blocks. "
        f"FLOPs and time are those of a forward pass over {result['batch']} images. All three are shares of the "
        "dense network's. The share of the ideal speed-up is FLOPs over time. "
        f"{result['threads']} threads, torch {result['torch']}."
    )


def main() -> None:
    """Measures all networks."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = [measure(name, args) for name in args.models]
    result = {
        "rows": rows,
        **{name: getattr(args, name) for name in ("images", "batch", "ratio", "image_size")},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor(),
    }
    print(convnets_table(result), describe_convnets(result), sep="\n\n")
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
