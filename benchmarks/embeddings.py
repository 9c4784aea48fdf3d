"""Prunes sentence encoders without labels, and measures what their embeddings are worth then.

    python -m benchmarks.embeddings --data_dir ../shared/glue
    python -m benchmarks.embeddings --models all-MiniLM-L6-v2 --grids main --seeds 0

A cell is a model, method, calibration text, ratio, seed, number of sentences for the refit, and phase. Each is a line
of `embeddings.jsonl`; a cell that is there is not computed again. Delete the file after a change of code or settings.
Seconds are the processor's. On one core, MiniLM takes some hours, and MPNet a day.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, PreTrainedModel

from glue_scripts.compare_glue.base_models import BASE_MODELS
from glue_scripts.compare_glue.cells import read_cells
from hap_transformers import Sensitivity, apply_plan, estimate_sensitivity, reconstruct, tune_layers
from hap_transformers.alignment.align_heads import align_heads
from hap_transformers.efficiency import count_encoder_parameters

from .embeddings_cells import DENSE, EXAMPLES, Cell, Key, append_cell, dense_key, keys_of
from .embeddings_data import Batches, Encoder, HeldOut, calibration_sentences
from .embeddings_methods import METHODS
from .embeddings_quality import measure
from .embeddings_recovery import recover


HERE = Path(__file__).parent


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "embeddings.jsonl")
    cache: str = field(default="build/embeddings", metadata={"help": "Where downloaded models are unpacked."})
    models: list[str] = field(default_factory=lambda: list(BASE_MODELS))
    grids: list[str] = field(default_factory=lambda: ["default", "sizes", "main", "elsewhere", "rates", "recovered"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    bf16: bool = field(default=False, metadata={"help": "Score, refit and embed in bf16."})


class Bench:
    """One encoder: its dense model, its scores by method, and its cells.

    Args:
        encoder (`Encoder`): The dense encoder.
        held_out (`HeldOut`): What quality is measured on.
        data_dir (`str`): Folder of the calibration texts.
        examples (`int`): Sentences to score on.
    """

    def __init__(self, encoder: Encoder, held_out: HeldOut, data_dir: str, examples: int = EXAMPLES):
        self.encoder, self.held_out, self.data_dir, self.examples = encoder, held_out, data_dir, examples
        self.known: dict[tuple, tuple[Sensitivity, float]] = {}
        self.bases: dict[tuple, tuple[PreTrainedModel, float]] = {}

    @cached_property
    def dense_embeddings(self) -> torch.Tensor:
        """Those of the held-out sentences."""
        return self.encoder.embed(self.encoder.model, self.held_out.sentences)

    def cell(self, key: Key) -> Cell:
        """Computes a cell, as it is written to the file."""
        method, seconds = METHODS.get(key.method), {}
        model = self.encoder.model
        if method is not None:
            model = self.pruned(key, seconds)
        if key.phase == "recovered":
            model, seconds["recover"] = timed(
                lambda: recover(model, self.encoder, self.data_dir, key.learning_rate, key.hidden, key.seed)
            )
        embeddings = (
            self.dense_embeddings if key.method == DENSE else self.encoder.embed(model, self.held_out.sentences)
        )
        return {
            **key._asdict(),
            **measure(embeddings, self.dense_embeddings, self.held_out),
            "kept": round(count_encoder_parameters(model) / count_encoder_parameters(self.encoder.model), 4),
            "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
            "bf16": self.encoder.bf16,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }

    def pruned(self, key: Key, seconds: dict[str, float]) -> PreTrainedModel:
        """Prunes a copy of the dense model, and notes the seconds of each phase."""
        method, dense = METHODS[key.method], self.encoder.model
        batches = self.calibration(key, self.examples)
        if method.align:
            dense, seconds["align"] = self.aligned(key, batches)
        sensitivity, seconds["score"] = self.scores(key, batches, dense)
        plan, seconds["plan"] = timed(lambda: method.plan(dense, sensitivity, batches, key.ratio))
        model = copy.deepcopy(dense)
        apply_plan(model, plan)
        if method.refit:
            more = self.calibration(key, key.refit_examples)
            _, seconds["refit"] = timed(lambda: reconstruct(model, dense, more, forward=self.encoder.run))
        if method.tuning:
            tuned = partial(tune_layers, model, dense, more, epochs=method.tuning, forward=self.encoder.run)
            _, seconds["tune"] = timed(tuned)
        method.finish(model)
        return model

    def aligned(self, key: Key, batches: Batches) -> tuple[PreTrainedModel, float]:
        """The dense model with heads in the basis of a text and seed, and the seconds that it took."""
        called = key.text, key.seed
        if called not in self.bases:
            model = copy.deepcopy(self.encoder.model)
            _, seconds = timed(lambda: align_heads(model, batches, seed=key.seed))
            self.bases = {called: (model, seconds)}
        return self.bases[called]

    def scores(self, key: Key, batches: Batches, dense: PreTrainedModel) -> tuple[Sensitivity, float]:
        """The dense model's scores and the seconds that they took; those of a text and seed are kept."""
        method = METHODS[key.method]
        called = method.score, method.align, key.text, key.seed
        if called not in self.known:
            self.known[called] = timed(
                lambda: estimate_sensitivity(
                    dense,
                    batches,
                    method.score,
                    seed=key.seed,
                    precision="bf16" if self.encoder.bf16 else None,
                    **method.scoring,
                )
            )
        return self.known[called]

    def calibration(self, key: Key, count: int) -> Batches:
        """Batches of unlabelled training sentences."""
        return self.encoder.batches(calibration_sentences(self.data_dir, key.text, key.seed, count))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the processor's seconds that it took."""
    start = time.process_time()
    return function(), time.process_time() - start


def main() -> None:
    """Computes the cells that are missing, grid by grid."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output, held_out = Path(args.output), HeldOut.load(args.data_dir)
    for name in args.models:
        keys = [dense_key(name), *(key for grid in args.grids for key in keys_of(grid, name, args.seeds))]
        known = read_cells(output, Key)
        if all(key in known for key in keys):
            continue
        bench = Bench(Encoder.load(name, Path(args.cache), args.bf16), held_out, args.data_dir)
        for key in dict.fromkeys(keys):
            if key not in known:
                append_cell(output, bench.cell(key))
                print(*key, flush=True)


if __name__ == "__main__":
    main()
