"""Prunes a sentence encoder to shares of all its parameters, embeddings included, without labels or training.

    python -m benchmarks.whole_model --data_dir ../shared/glue

A cell is a way, a share and a seed of the calibration sentences. Each is a line of `whole_model.jsonl`; a cell that is
there is not computed again. MiniLM takes a minute of one core a cell. `docs.render_results` makes the tables.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser, PreTrainedModel

from glue_scripts.compare_glue.cells import Cell, read_cells
from hap_transformers import (
    align_embeddings,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    trim_vocabulary,
)
from hap_transformers.efficiency import count_encoder_parameters, count_parameters

from .embeddings import timed
from .embeddings_cells import ELSEWHERE, EXAMPLES, HOME, append_cell
from .embeddings_data import CALIBRATION, Encoder, HeldOut, calibration_sentences, sentences_of
from .embeddings_quality import rank_correlation


HERE = Path(__file__).parent
MODEL = "all-MiniLM-L6-v2"
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
DIMENSIONS = ("query_key_dims", "value_dims", "neurons")
DENSE, TRIMMED = "dense", "vocabulary"
# Sentences of other data, whose embeddings are compared with the dense model's.
OTHERS = 500


@dataclass(frozen=True)
class Way:
    """What is removed.

    Args:
        kinds (`tuple[str, ...]`): The kinds of component.
        trim (`bool`): Whether the vocabulary is trimmed before.
    """

    kinds: tuple[str, ...]
    trim: bool = False


WAYS = {
    "encoder": Way(DIMENSIONS),
    "embeddings": Way(("embedding_dims",)),
    "model": Way(("embedding_dims", *DIMENSIONS)),
    "vocabulary and encoder": Way(DIMENSIONS, trim=True),
    "vocabulary and model": Way(("embedding_dims", *DIMENSIONS), trim=True),
}


class Key(NamedTuple):
    """The fields that tell one cell from another."""

    way: str
    share: float
    seed: int


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "whole_model.jsonl")
    cache: str = field(default="build/embeddings", metadata={"help": "Where downloaded models are unpacked."})
    model: str = MODEL
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    shares: list[float] = field(default_factory=lambda: list(SHARES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


class Bench:
    """An encoder, and its scores for the last way and seed.

    Args:
        encoder (`Encoder`): The dense encoder.
        held_out (`HeldOut`): What quality is measured on.
        data_dir (`str`): Folder of the calibration texts.
    """

    def __init__(self, encoder: Encoder, held_out: HeldOut, data_dir: str):
        self.encoder, self.held_out, self.data_dir = encoder, held_out, data_dir
        self.others = calibration_sentences(data_dir, ELSEWHERE, 0, OTHERS)
        self.rated = [held_out.sentences[place] for place in held_out.rated.flatten().tolist()]
        self.dense = self.embedded(encoder)
        self.known: tuple[Any, ...] = ()

    def cell(self, key: Key) -> Cell | None:
        """Computes a cell, as it is written to the file; nothing where so much cannot go in this way."""
        encoder, saved, seconds = self.encoder, {}, {}
        if key.way == TRIMMED:
            encoder = self.trimmed()
        elif key.way != DENSE:
            try:
                encoder, saved, seconds = self.pruned(key)
            except ValueError as error:
                if "cannot be met" not in str(error):
                    raise
                return None
        embeddings, count = self.embedded(encoder), len(self.rated)
        cosines = (embeddings * self.dense).sum(1)
        places = torch.arange(count).view(-1, 2)
        return {
            **key._asdict(),
            "spearman": round(rank_correlation(embeddings, places, self.held_out.ratings), 5),
            "cosine": round(float(cosines[:count].mean()), 5),
            "cosine_elsewhere": round(float(cosines[count:].mean()), 5),
            "parameters": count_parameters(encoder.model),
            "encoder_parameters": count_encoder_parameters(encoder.model),
            "saved": saved,
            "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        }

    def embedded(self, encoder: Encoder) -> torch.Tensor:
        """The embeddings of the rated pairs' sentences, in turn, and of the others."""
        return encoder.embed(encoder.model, [*self.rated, *self.others])

    def trimmed(self) -> Encoder:
        """The dense encoder with the vocabulary of the training sentences alone."""
        encoder = copy.deepcopy(self.encoder)
        texts = [sentence for task in CALIBRATION[HOME] for sentence in sentences_of(self.data_dir, task, "train")]
        trim_vocabulary(encoder.model, encoder.tokenizer, texts)
        return encoder

    def pruned(self, key: Key) -> tuple[Encoder, dict[str, int], dict[str, float]]:
        """A smaller encoder, the parameters that every kind gave, and the seconds of each phase."""
        if self.known[:2] != (key.way, key.seed):
            self.known = (key.way, key.seed, *self.scored(WAYS[key.way], key.seed))
        _, _, encoder, sensitivity, seconds = self.known
        whole = count_parameters(self.encoder.model)
        dense = count_parameters(self.trimmed().model) if WAYS[key.way].trim else whole
        ratio = 1 - (1 - key.share) * whole / dense
        plan = plan_pruning(sensitivity, encoder.model, budget="model", ratio=ratio)
        smaller = copy.deepcopy(encoder)
        apply_plan(smaller.model, plan)
        more = smaller.batches(calibration_sentences(self.data_dir, HOME, key.seed, EXAMPLES))
        _, refit = timed(lambda: reconstruct(smaller.model, encoder.model, more, progress=False))
        return smaller, plan.saved, {**seconds, "refit": refit}

    def scored(self, way: Way, seed: int) -> tuple[Encoder, Any, dict[str, float]]:
        """The encoder, trimmed and aligned as a way asks for, its scores, and the seconds that they took."""
        encoder = self.trimmed() if way.trim else copy.deepcopy(self.encoder)
        model: PreTrainedModel = encoder.model
        batches = encoder.batches(calibration_sentences(self.data_dir, HOME, seed, EXAMPLES))

        def align() -> None:
            if "value_dims" in way.kinds:
                align_heads(model, batches, seed=seed, progress=False)
            if "embedding_dims" in way.kinds:
                align_embeddings(model, batches, seed=seed, progress=False)

        _, aligning = timed(align)
        scoring = {"components": list(way.kinds), "seed": seed, "progress": False}
        sensitivity, seconds = timed(lambda: estimate_sensitivity(model, batches, **scoring))
        return encoder, sensitivity, {"align": aligning, "score": seconds}


def keys_of(ways: list[str], shares: list[float], seeds: list[int]) -> list[Key]:
    """The keys of all cells, seed by seed, so that a run that is cut short has whole seeds."""
    return [
        Key(DENSE, 0.0, 0),
        Key(TRIMMED, 0.0, 0),
        *(Key(way, share, seed) for seed in seeds for way in ways for share in shares),
    ]


def main() -> None:
    """Computes the cells that are missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    output, known = Path(args.output), read_cells(Path(args.output), Key)
    bench = Bench(Encoder.load(args.model, Path(args.cache)), HeldOut.load(args.data_dir), args.data_dir)
    for key in keys_of(args.ways, args.shares, args.seeds):
        if key not in known and (cell := bench.cell(key)) is not None:
            append_cell(output, cell)
            print(*key, flush=True)


if __name__ == "__main__":
    main()
