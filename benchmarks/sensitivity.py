"""Measures what scoring costs, as ratios within one run: to a plain forward+backward, to PyHessian, to itself.

    python -m benchmarks.sensitivity --data_dir ../shared/glue

PyHessian comes from PyPI (`pip install pyhessian==0.1 --no-deps`). Nothing else should run on the machine. The command
prints a table and writes JSON.
"""

import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from scipy.stats import spearmanr
from transformers import HfArgumentParser

from hap_transformers import Sensitivity, estimate_sensitivity

from . import workloads
from .markdown_table import table


HERE = Path(__file__).parent

# Each row: a name, the contender, the reference, and a target, the most that the ratio of the two should be. `None`
# has no target: the row is for comparison alone.
TIMES = [
    ("Gauss-Newton, 2 classes / forward+backward", "gn", "fb", 0.9),
    ("Gauss-Newton, 3 classes / forward+backward", "gn 3 classes", "fb", 1.7),
    ("Gauss-Newton bf16 / forward+backward bf16", "gn bf16", "fb bf16", 1.1),
    ("Hutchinson / PyHessian, a probe, graphs included", "hutchinson", "pyhessian", 0.8),
    ("Hutchinson with its graph / PyHessian's loop alone, a probe", "hutchinson", "pyhessian loop", None),
    ("Hutchinson bf16 / fp32", "hutchinson bf16", "hutchinson", 0.5),
    ("Gauss-Newton, 24 heads / 12 heads, same width", "gn 24 heads", "gn", 1.1),
    ("Gauss-Newton, 8 x the examples / 8 x the time", "gn 8x", "8 gn", 1.05),
]
MEMORY = [
    ("peak memory, Gauss-Newton / forward+backward", "gn", "fb", 1.1),
    ("peak memory, Hutchinson / PyHessian", "hutchinson", "pyhessian", 0.8),
    ("peak memory, Gauss-Newton, 8 x the examples / 1 x", "gn 8x", "gn", 1.05),
]


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "sensitivity.json")
    repeats: int = 5
    training_steps: int = 114
    max_probes: int = 256


def measure_times(args: Arguments) -> list[dict]:
    """Measures rounds in which every contender runs once: a drift of the machine's speed affects all of them."""
    two, three = workloads.load_batches(args.data_dir, 2), workloads.load_batches(args.data_dir, 2, num_labels=3)
    model, model_3, model_24 = (
        workloads.load_model(),
        workloads.load_model(3),
        workloads.load_model(num_attention_heads=24),
    )
    contenders: dict[str, Callable[[], object]] = {
        "fb": lambda: workloads.forward_backward(model, two),
        "gn": lambda: workloads.gauss_newton(model, two),
        "gn 3 classes": lambda: workloads.gauss_newton(model_3, three),
        "gn 24 heads": lambda: workloads.gauss_newton(model_24, two),
        "gn 8x": lambda: workloads.gauss_newton(model, two * 8),
        "fb bf16": lambda: workloads.forward_backward(model, two, "bf16"),
        "gn bf16": lambda: workloads.gauss_newton(model, two, "bf16"),
        "hutchinson": lambda: workloads.hutchinson(model, two[:1]),
        "hutchinson bf16": lambda: workloads.hutchinson(model, two[:1], "bf16"),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        seconds["pyhessian loop"].append(workloads.pyhessian(model, two[:1]))
        seconds["pyhessian"].append(time.perf_counter() - start)
        print(f"round {repeat} of {args.repeats}", file=sys.stderr)
    seconds = {name: values[1:] for name, values in seconds.items()}  # The first round warms up.
    seconds["8 gn"] = [8 * value for value in seconds["gn"]]
    return [
        {
            "measure": measure,
            "target": target,
            "ratio": statistics.median(ratios := [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]),
            "smallest": min(ratios),
            "largest": max(ratios),
            "values": [statistics.median(seconds[over]), statistics.median(seconds[under])],
            "unit": "s",
        }
        for measure, over, under, target in TIMES
    ]


def measure_memory(args: Arguments) -> list[dict]:
    """Measures the peak memory of tensors beyond the loaded model and data."""
    model, two = workloads.load_model(), workloads.load_batches(args.data_dir, 2)
    workloads.forward_backward(model, two)  # Loads the kernels.
    peaks = {
        "fb": workloads.peak_memory(lambda: workloads.forward_backward(model, two)),
        "gn": workloads.peak_memory(lambda: workloads.gauss_newton(model, two)),
        "gn 8x": workloads.peak_memory(lambda: workloads.gauss_newton(model, two * 8)),
        "hutchinson": workloads.peak_memory(lambda: workloads.hutchinson(model, two[:1])),
        "pyhessian": workloads.peak_memory(lambda: workloads.pyhessian(model, two[:1])),
    }
    return [
        {
            "measure": measure,
            "target": target,
            **dict.fromkeys(("ratio", "smallest", "largest"), peaks[over] / peaks[under]),
            "values": [peaks[over], peaks[under]],
            "unit": "MiB",
        }
        for measure, over, under, target in MEMORY
    ]


def measure_reliability(args: Arguments) -> dict:
    """Measures the reliability that probes and seconds buy for a ranking of heads, on a model trained on the task."""
    batches = workloads.load_batches(args.data_dir, max(16, args.training_steps))
    model = workloads.load_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for batch in batches[: args.training_steps]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    scored = batches[:16]
    exact = {
        name: workloads.gauss_newton(model, scored, None if name == "fp32" else name) for name in ("fp32", "bf16")
    }
    visits = args.max_probes // (len(scored) * workloads.PROBES)
    settings = {"num_probes": workloads.PROBES, "precision": "bf16", "components": ["heads"], "progress": False}
    noisy = estimate_sensitivity(model, scored * visits, "hessian_trace", tolerance=0.9, **settings)

    def flat(result: Sensitivity, kind: str) -> torch.Tensor:
        return torch.cat(result.scores[kind])

    return {
        "examples": exact["fp32"].num_examples,
        "gauss_newton": {
            name: {"seconds": result.seconds, "reliability": result.reliability} for name, result in exact.items()
        },
        "bf16_fp32_spearman": {
            kind: float(spearmanr(flat(exact["fp32"], kind), flat(exact["bf16"], kind)).statistic)
            for kind in ("heads", "neurons")
        },
        "hutchinson": {
            "precision": "bf16",
            "probe_batches": noisy.num_examples // workloads.BATCH_SIZE * workloads.PROBES,
            "seconds": noisy.seconds,
            "reliability": noisy.reliability,
            "reached_0.9": noisy.converged,
            "spearman_to_gauss_newton": float(spearmanr(flat(noisy, "heads"), flat(exact["fp32"], "heads")).statistic),
        },
    }


def main() -> None:
    """Measures everything, prints the table, writes JSON."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = measure_times(args) + measure_memory(args)
    print(table(rows), flush=True)
    findings = measure_reliability(args)
    print(json.dumps(findings, indent=2))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    capability = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    settings = {"repeats": args.repeats, "training_steps": args.training_steps, "max_probes": args.max_probes}
    result = {"rows": rows, "findings": findings, "settings": settings, "versions": versions, "machine": capability}
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
