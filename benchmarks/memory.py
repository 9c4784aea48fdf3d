"""Measures the peak memory of scoring and of surgery with a refit, on Llama shapes with random weights.

    python -m benchmarks.memory

Every figure is the resident set of a process of its own (Linux), beyond what it held before it made the model. A
formula says what larger models take. The command prints tables and writes JSON.
"""

import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hap_transformers import METHODS, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.refit.dense_copy import sharing_copy
from hap_transformers.refit.kept_values import LIMIT
from hap_transformers.sensitivity.methods import Finished
from hap_transformers.sensitivity.statistics import SampleMoments
from hap_transformers.sensitivity.surgeon import elimination_bytes
from hap_transformers.sensitivity.task import ScoringTask

from .latency import uneven_scores
from .markdown_table import memory_table
from .workloads import kronecker_with


HERE = Path(__file__).parent
BATCHES, TOKENS = 2, 256
RATIO = 0.6


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, in float32.

    Args:
        width (`int`): Hidden size.
        neurons (`int`): FFN neurons a layer.
        layers (`int`): Number of layers.
        heads (`int`): Query heads a layer.
        kv_heads (`int`): Key-value heads a layer.
        vocabulary (`int`, *optional*, defaults to 32000): Number of tokens.
    """

    width: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def config(self) -> LlamaConfig:
        """The configuration of a model of this shape."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
        )

    def layer_parameters(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        return round(attention) + 3 * self.width * self.neurons + 2 * self.width

    def model_bytes(self) -> int:
        """Bytes of the weights."""
        return 4 * (2 * self.vocabulary * self.width + self.width + self.layers * self.layer_parameters())

    def score_bytes(self, max_memory: int) -> int:
        """Bytes of scoring by `kronecker`: the model, and the sums of the layers that are scored in one part.

        The sums are both factors of every output projection, n inputs by n and d outputs by d. The elimination of one
        projection takes six matrices of n by n.
        """
        layer = 8 * (self.neurons**2 + 3 * self.width**2)
        elimination = elimination_bytes(max(self.neurons, self.width))
        at_once = min(max((max_memory - elimination) // layer, 1), self.layers)
        return self.model_bytes() + at_once * layer + elimination

    def refit_bytes(self) -> int:
        """Bytes of surgery and refit: the dense model, what is left of it, the sums, and the tokens.

        The sums are products of a projection's inputs with each other and with its outputs. Of every token, the
        residual stream is kept four times: at a layer of each model, and as the target of each of its two blocks.
        What does not fit into `LIMIT` is kept in files.
        """
        pruned = self.model_bytes() - 4 * RATIO * self.layers * self.layer_parameters()
        sums = 8 * (self.neurons**2 + self.neurons * self.width)
        return round(self.model_bytes() + pruned + sums + min(4 * 4 * BATCHES * TOKENS * self.width, LIMIT))


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 100),
    "0.1": Shape(768, 2048, 12, 12, 4),
    "0.5": Shape(1536, 4096, 16, 12, 3),
    "1": Shape(2048, 8192, 16, 32, 8),
    "8": Shape(4096, 14336, 32, 32, 8, 128256),
    "70": Shape(8192, 28672, 80, 64, 8, 128256),
}
# An elimination takes a minute; those of a model's other layers take as much memory.
ENDS_ONLY = ("1",)


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str = str(HERE / "memory.json")
    shapes: list[str] = field(default_factory=lambda: ["0.1", "0.5", "1"])
    child: str = field(default="", metadata={"help": "measure one job, 'score' or 'refit', in this process"})


def make_batches(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Makes batches of one text of random tokens; a text's labels are its tokens."""
    tokens = torch.randint(0, vocabulary, (BATCHES, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens]


def score(name: str, model: LlamaForCausalLM) -> None:
    """Scores a model, in parts that fit into the model's bytes."""
    shape, kronecker = SHAPES[name], METHODS["kronecker"]
    computed = {0, shape.layers - 1} if name in ENDS_ONLY else set(range(shape.layers))

    def settle(task: ScoringTask, moments: SampleMoments, progress: bool) -> Finished:
        if computed.intersection(group.layer for group in task.groups):
            return kronecker.settle(task, moments, progress)
        return Finished(torch.zeros(sum(task.counts)).double(), torch.cat([torch.arange(n) for n in task.counts]))

    batches, limit = make_batches(shape.vocabulary), shape.model_bytes()
    with kronecker_with(settle=settle) as method:
        estimate_sensitivity(model, batches, method, num_probes=1, max_memory=limit, progress=False)


def refit(name: str, model: LlamaForCausalLM) -> None:
    """Plans by random scores, prunes and refits."""
    plan = plan_pruning(uneven_scores(model), model, ratio=RATIO)
    dense = sharing_copy(model)
    apply_plan(model, plan)
    reconstruct(model, dense, make_batches(SHAPES[name].vocabulary), progress=False)


def forward_backward(name: str, model: LlamaForCausalLM) -> None:
    """Runs a pass over one batch after the other, through the activations alone."""
    model.requires_grad_(False)
    for batch in make_batches(SHAPES[name].vocabulary):
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        model(inputs_embeds=embedded, **batch).loss.backward()


JOBS: dict[str, Callable[[str, LlamaForCausalLM], None]] = {"pass": forward_backward, "score": score, "refit": refit}


def peak_bytes() -> int:
    """The largest resident set that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_here(name: str, job: str) -> dict[str, float]:
    """Runs a job in this process, which must be new."""
    torch.manual_seed(0)
    JOBS[job]("tiny", LlamaForCausalLM(SHAPES["tiny"].config()).eval())  # Loads all code.
    before = peak_bytes()
    model = LlamaForCausalLM(SHAPES[name].config()).eval()
    start = time.perf_counter()
    JOBS[job](name, model)
    return {"before": before, "peak": peak_bytes() - before, "seconds": time.perf_counter() - start}


def measure(name: str, job: str) -> dict[str, float]:
    """Runs a job in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", job, "--shapes", name]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent).stdout
    return json.loads(printed.splitlines()[-1])


def rows_of(name: str, measured: dict[str, dict[str, float]]) -> list[dict]:
    """The lines of the table for a shape.

    Args:
        name (`str`): The shape.
        measured (`dict`): What [`measure`] returned, by job; none for a shape that is only computed.
    """
    shape = SHAPES[name]
    sizes = {"billions": name, "shape": asdict(shape), "model": shape.model_bytes(), "least": shape.score_bytes(1)}
    formulas = {"score": shape.score_bytes(shape.model_bytes()), "refit": shape.refit_bytes()}
    # Twice the model, and the activations of a pass.
    target = shape.model_bytes() + measured["pass"]["peak"] if "pass" in measured else None
    jobs = measured or formulas
    return [
        {
            **sizes,
            "job": job,
            "formula": formulas.get(job),
            "target": target if job in formulas else None,
            **measured.get(job, {}),
        }
        for job in jobs
    ]


def result(rows: list[dict]) -> dict:
    """What is written: the rows, and where they were measured."""
    return {
        "rows": rows,
        "settings": {"batches": BATCHES, "tokens": TOKENS, "ratio": RATIO, "ends_only": list(ENDS_ONLY)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()},
    }


def main() -> None:
    """Measures, prints and writes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.child:
        logging.getLogger("hap_transformers").setLevel("ERROR")  # So few tokens rank nothing reliably.
        print(json.dumps(measure_here(args.shapes[0], args.child)))
        return
    rows: list[dict] = []
    for name in args.shapes:
        rows += rows_of(name, {job: measure(name, job) for job in JOBS})
        print(f"{name} billion parameters", file=sys.stderr)
    rows += [line for name in ("8", "70") for line in rows_of(name, {})]
    print(memory_table(rows))
    Path(args.output).write_text(json.dumps(result(rows), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
