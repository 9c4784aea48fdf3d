"""Compares ways to prune on GLUE: every method from the same dense models, with the same recovery.

    python compare_glue.py --data_dir PARQUET_FOLDER --output_dir outputs/compare
    python compare_glue.py --data_dir PARQUET_FOLDER --tasks mrpc --methods hap gradient --ratios 0.8 --seeds 0

Every cell (task, method, ratio, seed) is a line of `cells.jsonl`; those that are there are not run again. Dense models
are kept in `dense/`. With `--fold`, a part of the training split that no model is trained on takes the place of the
validation split: settings are chosen there.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comparison_table import table
from datasets import Dataset
from demo_data import demo_model_path
from tasks import Task, load_task
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hap_transformers import HapConfig, HapTrainer, PruningPlan, Sensitivity, plan_pruning
from hap_transformers.blocks import attention_blocks, feed_forward_blocks
from hap_transformers.releases import TRANSFORMERS_4


@dataclass
class Setting:
    """How a task is trained.

    Args:
        examples (`int`, *optional*): Training examples; by default all.
        epochs (`int`): Epochs of fine-tuning.
        recovery_examples (`int`, *optional*): Training examples after pruning; by default all.
        recovery_epochs (`int`): Epochs after pruning.
    """

    examples: int | None
    epochs: int
    recovery_examples: int | None
    recovery_epochs: int


SETTINGS = {"mrpc": Setting(None, 4, None, 2), "sst2": Setting(20_000, 2, 10_000, 1)}
# Examples held out of the training split by --fold: a fifth of a split that is used whole.
FOLD = 4_000
LEARNING_RATE, RECOVERY_LEARNING_RATE = 1e-4, 5e-5

# Scores of a dense model by a method.
Scored = Callable[[str], Sensitivity]


@dataclass
class Arguments:
    """What to compare."""

    data_dir: str = field(metadata={"help": "Folder with TASK/{train,validation}.parquet."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where cells and dense models are kept."})
    tasks: list[str] = field(default_factory=lambda: list(SETTINGS))
    methods: list[str] = field(default_factory=lambda: list(COMPARED))
    ratios: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.8])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    fold: bool = field(default=False, metadata={"help": "Evaluate on a held-out part of the training split."})
    recover: bool = field(default=True, metadata={"help": "Train after pruning, too."})


def configured(trainer: HapTrainer, scored: Scored) -> PruningPlan:
    """What the trainer's configuration says."""
    return trainer.plan(scored(trainer.hap_config.method))


def gradient(trainer: HapTrainer, scored: Scored) -> PruningPlan:
    """Mask gradients as in Michel et al.: no floors; the same share of heads and of neurons."""
    ratio = trainer.hap_config.ratio
    return plan_pruning(scored("gradient"), trainer.model, ratio=ratio, min_heads=0, min_neurons=0)


def top_layers(trainer: HapTrainer, scored: Scored) -> PruningPlan:
    """Drops layers from the top, the last one partly: those heads and neurons that mask gradients rank lowest."""
    by_gradient, layers = scored("gradient"), trainer.model.config.num_hidden_layers

    def from_the_top(scores: list[torch.Tensor]) -> list[torch.Tensor]:
        # Ranks within a layer are far smaller than the step from layer to layer.
        return [layers - i + own.argsort().argsort() / (2 * len(own)) for i, own in enumerate(scores)]

    scores = Sensitivity("kronecker", from_the_top(by_gradient.heads), from_the_top(by_gradient.neurons))
    return plan_pruning(scores, trainer.model, ratio=trainer.hap_config.ratio, weigh_costs=False)


# By name: what the configuration says beside the ratio, and how to plan.
METHODS: dict[str, tuple[dict[str, Any], Callable[[HapTrainer, Scored], PruningPlan]]] = {
    "hap": ({}, configured),
    "gradient": ({"refit": False}, gradient),
    "gradient, floor and refit": ({"method": "gradient"}, configured),
    "top layers dropped": ({"refit": False}, top_layers),
    "hap without refit": ({"refit": False}, configured),
    "hap with implants": ({"implant_ratio": 0.1}, configured),
    "relative trace, floor and refit": ({"method": "gauss_newton_trace"}, configured),
    "relative trace, one shot": (
        {
            "method": "gauss_newton_trace",
            "min_heads": 0,
            "min_neurons": 0.0,
            "neuron_multiple": 1,
            "weigh_costs": False,
            "refit": False,
        },
        configured,
    ),
}
COMPARED = list(METHODS)[:4]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the cells that are missing, prints the table and returns all cells asked for."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    unknown = [name for name in args.methods if name not in METHODS]
    unknown += [name for name in args.tasks if name not in SETTINGS]
    if unknown:
        raise ValueError(f"Unknown {unknown}; methods are {', '.join(METHODS)}, tasks {', '.join(SETTINGS)}.")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    cells_file = output / "cells.jsonl"
    lines = cells_file.read_text(encoding="utf-8").splitlines() if cells_file.exists() else []
    cells = {_key(cell): cell for cell in map(json.loads, lines)}
    wanted = []
    for seed in args.seeds:
        for task in args.tasks:
            job = Job(args, task, seed)
            for method in args.methods:
                for ratio in args.ratios:
                    key = (task, method, ratio, seed, args.fold)
                    if key not in cells:
                        cells[key] = job.run(method, ratio)
                        with cells_file.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(cells[key]) + "\n")
                    wanted.append(cells[key])
    print(table(wanted))
    return wanted


def _key(cell: dict[str, Any]) -> tuple:
    return cell["task"], cell["method"], cell["ratio"], cell["seed"], cell["fold"]


class Job:
    """One task and seed: its data and its dense model, made when first asked for."""

    def __init__(self, args: Arguments, task: str, seed: int):
        self.args, self.name, self.seed, self.setting = args, task, seed, SETTINGS[task]
        self.dense: PreTrainedModel | None = None
        self.scores: dict[str, Sensitivity] = {}

    def run(self, method: str, ratio: float) -> dict[str, Any]:
        """Prunes and recovers one model."""
        if self.dense is None:
            self._prepare()
        changes, plan = METHODS[method]
        model = copy.deepcopy(self.dense)
        config = HapConfig(**{**changes, "ratio": ratio, "recovery_learning_rate": RECOVERY_LEARNING_RATE})
        trainer = self._trainer(model, self.setting.recovery_examples, self.setting.recovery_epochs, config)
        set_seed(self.seed)
        start = time.perf_counter()  # Scores are shared by all ratios.
        trainer.prune(plan(trainer, self._scored))
        cell = {"task": self.name, "method": method, "ratio": ratio, "seed": self.seed, "fold": self.args.fold}
        cell |= {"dense": self.dense_metrics, "pruned": self._measure(trainer)}
        cell["prune_seconds"] = round(time.perf_counter() - start, 1)
        if self.args.recover:
            trainer.train()
            cell["recovered"] = self._measure(trainer)
        cell["heads"] = [block.num_components for block in attention_blocks(trainer.model)]
        cell["neurons"] = [block.num_components for block in feed_forward_blocks(trainer.model)]
        cell["parameters"] = trainer.results["parameters"]
        return cell

    def _prepare(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        self.task = load_task(self.name, self.args.data_dir)
        train, self.evaluated = self._splits(self.task)
        self.train = train
        folder = Path(self.args.output_dir) / "dense" / f"{self.name}-{self.seed}{'-fold' * self.args.fold}"
        if not (folder / "config.json").exists():
            set_seed(self.seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                demo_model_path(), num_labels=self.task.num_labels
            )
            self._trainer(model, None, self.setting.epochs).train()
            model.save_pretrained(folder)
        self.dense = AutoModelForSequenceClassification.from_pretrained(folder)
        self.dense_metrics = self._measure(self._trainer(self.dense, None, 1))

    def _scored(self, method: str) -> Sensitivity:
        if method not in self.scores:
            trainer = self._trainer(copy.deepcopy(self.dense), None, 1, HapConfig(method=method))
            self.scores[method] = trainer.estimate_sensitivity()
        return self.scores[method]

    def _splits(self, task: Task) -> tuple[Dataset, Dataset]:
        data = task.tokenize(self.tokenizer, 128)
        train = data["train"].shuffle(seed=0)  # The same examples for all seeds.
        size = self.setting.examples
        if not self.args.fold:
            return train.select(range(size or len(train))), data["validation"]
        if size is None:
            held_out = len(train) // 5
            return train.select(range(held_out, len(train))), train.select(range(held_out))
        return train.select(range(size)), train.select(range(size, size + FOLD))

    def _trainer(
        self, model: PreTrainedModel, examples: int | None, epochs: int, hap_config: HapConfig | None = None
    ) -> HapTrainer:
        strategy = {"group_by_length": True} if TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}
        args = TrainingArguments(
            output_dir=str(Path(self.args.output_dir) / "trainer"),
            num_train_epochs=epochs,
            learning_rate=LEARNING_RATE,
            warmup_steps=50,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            seed=self.seed,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **strategy,
        )
        return HapTrainer(
            model=model,
            args=args,
            train_dataset=self.train.select(range(min(examples or len(self.train), len(self.train)))),
            eval_dataset=self.evaluated,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=self.task.metrics(),
            processing_class=self.tokenizer,
            hap_config=hap_config,
        )

    def _measure(self, trainer: HapTrainer) -> dict[str, float]:
        metrics = trainer.evaluate()
        return {name: round(metrics[f"eval_{name}"], 5) for name in ("accuracy", "loss")}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"compare_glue.py: {error}")
