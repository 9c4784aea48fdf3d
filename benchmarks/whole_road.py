"""Takes a large language model down the whole road on the CPU: score, plan, prune, refit, save, load, generate.

    python -m benchmarks.whole_road

The model is a Llama shape with random weights, in float32, so time and memory say what they would for a trained one,
and nothing else. The sums of scoring and refit may take as much memory as the model. The command runs the road in a
process of its own (Linux), prints a table and writes JSON.
"""

import gc
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM

from hap_transformers import apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.efficiency import count_encoder_parameters
from hap_transformers.refit.dense_copy import sharing_copy

from .memory import BATCHES, SHAPES, TOKENS, make_batches, peak_bytes


HERE = Path(__file__).parent
RATIO = 0.3
# What the road should fit into.
MOST_GIB = 20


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str = str(HERE / "whole_road.json")
    shape: str = field(default="1", metadata={"help": f"In billions of parameters: {', '.join(SHAPES)}."})
    child: bool = field(default=False, metadata={"help": "measure in this process"})


@dataclass
class Road:
    """Seconds and peak memory of the phases so far."""

    phases: list[dict]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the code inside; its peak is the largest that the process has had up to its end."""
        start = time.perf_counter()
        yield
        gc.collect()
        found = {
            "phase": name,
            "seconds": round(time.perf_counter() - start, 1),
            "gib": round(peak_bytes() / 2**30, 2),
        }
        self.phases.append(found)
        print(*found.values(), file=sys.stderr, flush=True)


def travel(name: str) -> dict:
    """Runs the road in this process."""
    torch.manual_seed(0)
    shape, road = SHAPES[name], Road([])
    with road.phase("make"):
        model = LlamaForCausalLM(shape.config()).eval()
    dense_parameters = count_encoder_parameters(model)
    batches = [
        {key: batch[key] for key in ("input_ids", "attention_mask")} for batch in make_batches(shape.vocabulary)
    ]
    with road.phase("score"):
        scores = estimate_sensitivity(
            model, batches, num_probes=1, components=["heads", "neurons"], max_memory=shape.model_bytes()
        )
    with road.phase("plan and surgery"):
        plan, dense = plan_pruning(scores, model, ratio=RATIO), sharing_copy(model)
        apply_plan(model, plan)
    with road.phase("refit"):
        reconstruct(model, dense, batches, max_memory=shape.model_bytes())
    del dense
    prompt = batches[0]["input_ids"][:, :16]
    with tempfile.TemporaryDirectory() as folder:
        with road.phase("save"):
            model.save_pretrained(folder)
        with road.phase("generate"):
            expected = model.generate(prompt, max_new_tokens=16, do_sample=False)
        kept = count_encoder_parameters(model)
        del model
        with road.phase("load"):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        found = loaded.generate(prompt, max_new_tokens=16, do_sample=False)
    return {"phases": road.phases, "same_tokens": torch.equal(found, expected), "kept": kept / dense_parameters}


def road_table(result: dict) -> str:
    """Formats the phases, with seconds a layer."""
    layers = result["shape"]["layers"]
    lines = ["| phase | seconds | a layer | peak until then, GiB |", "| --- | --- | --- | --- |"]
    for row in result["phases"]:
        lines.append(f"| {row['phase']} | {row['seconds']:.0f} | {row['seconds'] / layers:.1f} | {row['gib']:.1f} |")
    return "\n".join(lines)


def describe_road(result: dict) -> str:
    """Says what was measured."""
    shape = result["shape"]
    same = "the same tokens as" if result["same_tokens"] else "OTHER tokens than"
    return (
        f"{shape['layers']} layers of width {shape['width']} with {shape['neurons']:,} neurons and {shape['heads']} "
        f"heads; {1 - result['kept']:.0%} of the layers' parameters are removed, on {result['batches']} texts of "
        f"{result['tokens']} tokens with one probe each. The loaded model generates {same} the one that was saved. "
        f"The peak should be at most {MOST_GIB} GiB. Threads: {result['threads']}; torch {result['torch']}."
    )


def main() -> None:
    """Runs the road in a new process, prints and writes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.child:
        logging.getLogger("hap_transformers").setLevel("ERROR")  # Random weights rank nothing reliably.
        print(json.dumps(travel(args.shape)))
        return
    command = [sys.executable, "-m", "benchmarks.whole_road", "--child", "True", "--shape", args.shape]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent).stdout
    result = {
        **json.loads(printed.splitlines()[-1]),
        "billions": args.shape,
        "shape": asdict(SHAPES[args.shape]),
        "batches": BATCHES,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    print(road_table(result), describe_road(result), sep="\n\n")
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
