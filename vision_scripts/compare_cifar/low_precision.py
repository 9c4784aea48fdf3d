"""Measures EHAP's claim: traces of the Hessian by products in low precision rank as those in float32 do, for less.

    python -m vision_scripts.compare_cifar.low_precision --data_dir DIR --dense_dir DIR

Every precision runs in a process of its own, whose largest resident set (Linux) is that beyond what it held before.
The same probes in another precision are compared with those in float32; so are other probes in float32, whose rank
correlation is what the noise of so few probes leaves.
"""

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import HfArgumentParser

from benchmarks.embeddings import timed
from benchmarks.memory import peak_bytes
from hap_transformers import Sensitivity, estimate_sensitivity
from vision_scripts.image_data import load_image_task
from vision_scripts.image_inputs import make_inputs

from .data import Collator
from .networks import NETWORKS


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "cifar_precision.json"
# What is run, by name: the precision, and the seed of the probes.
RUNS: dict[str, tuple[str | None, int]] = {
    "float32": (None, 0),
    "float32, other probes": (None, 1),
    "bf16": ("bf16", 0),
    "fp16": ("fp16", 0),
}
REFERENCE = "float32"


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = field(metadata={"help": "Folder with train.parquet and test.parquet of CIFAR-10."})
    dense_dir: str = field(metadata={"help": "Folder with the weights of the dense networks."})
    output: str = field(default=str(RESULTS), metadata={"help": "File of the results."})
    network: str = field(default="preresnet29", metadata={"help": f"One of {', '.join(NETWORKS)}."})
    images: int = field(default=32, metadata={"help": "Training images that every probe runs on."})
    probes: int = field(default=20, metadata={"help": "Probes of the Hessian."})
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": f"Some of {', '.join(RUNS)}."})
    child: str = field(default="", metadata={"help": "Measure one run in this process, and save its scores here."})


def measure_here(args: Arguments) -> dict[str, float]:
    """Measures the one run that is named in this process, which must be new, and saves its scores."""
    (name,) = args.runs
    precision, seed = RUNS[name]
    model = NETWORKS[args.network].load(Path(args.dense_dir)).eval()
    # Not all images are decoded: that would take most of the memory.
    inputs = make_inputs(load_image_task("cifar10", args.data_dir), {"train": args.images, "validation": 1}, seed=0)
    collate = Collator(inputs.collator, NETWORKS[args.network].size)
    batches = [collate([inputs.train[number] for number in range(args.images)])]
    few = [{key: value[:1] for key, value in batches[0].items()}]

    def score(images: Any, probes: int) -> Sensitivity:
        return estimate_sensitivity(
            model, images, "hessian_trace", num_probes=probes, precision=precision, seed=seed, progress=False
        )

    score(few, 1)  # Loads all code.
    before = peak_bytes()
    found, seconds = timed(lambda: score(batches, args.probes))
    found.save(args.child)
    return {"seconds": seconds, "before": before, "peak": peak_bytes() - before, "reliability": found.reliability}


def measure(args: Arguments, name: str, scores: Path) -> dict[str, Any]:
    """Measures a run in a new process; one that the processor cannot do has an `error`."""
    flags = {"network": args.network, "images": args.images, "probes": args.probes, "runs": name, "child": scores}
    flags |= {"data_dir": Path(args.data_dir).resolve(), "dense_dir": Path(args.dense_dir).resolve()}
    command = [sys.executable, "-m", "vision_scripts.compare_cifar.low_precision"]
    command += [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"run": name, "error": done.stderr.strip().splitlines()[-1]}
    return {"run": name, **json.loads(done.stdout.splitlines()[-1])}


def rank_correlation(one: Sensitivity, other: Sensitivity) -> float:
    """Spearman's correlation of the scores of all channels."""
    return float(spearmanr(*(torch.cat(found.scores["channels"]) for found in (one, other))).statistic)


def main(arguments: list[str] | None = None) -> None:
    """Measures all runs and writes them."""
    parser = HfArgumentParser(Arguments, prog="python -m vision_scripts.compare_cifar.low_precision")
    (args,) = parser.parse_args_into_dataclasses(arguments)
    if args.child:
        logging.getLogger("hap_transformers").setLevel("ERROR")  # So few probes rank nothing reliably.
        print(json.dumps(measure_here(args)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.safetensors" for number, name in enumerate(args.runs)}
        for name, file in files.items():
            row = measure(args, name, file)
            if "error" not in row and name != REFERENCE:
                row["rank_correlation"] = rank_correlation(*map(Sensitivity.load, (files[REFERENCE], file)))
            rows.append(row)
            print(row, flush=True)
    result = {
        "rows": rows,
        "settings": {"network": args.network, "images": args.images, "probes": args.probes},
        "machine": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()},
        "versions": {"torch": torch.__version__},
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
