"""One task and seed of a comparison: its data, its dense model, its scores, and a cell for each method."""

import copy
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    set_seed,
)

from hap_transformers import HapConfig, HapTrainer, Sensitivity
from hap_transformers.components.groups import find_groups, of_kind
from hap_transformers.components.releases import GROUPED_BY_LENGTH
from hap_transformers.data.metrics import quality_metrics
from hap_transformers.data.tasks import load_task
from hap_transformers.efficiency import bf16_is_fast
from hap_transformers.forward_modes import device_name
from hap_transformers.reporting.ranks import head_ranks

from .base_models import BASE_MODELS, MINILM
from .cells import Cell
from .folds import split_fold
from .methods import METHODS, Score
from .quiet_training import quiet_arguments
from .remembered_teacher import remember_logits
from .settings import (
    COMMON,
    COMPONENTS,
    MAX_LENGTH,
    SCORES,
    SETTINGS,
    WARMUP_STEPS,
    CommonSettings,
)


class Job:
    """One task and seed. The dense model and the scores are made when first asked for, and kept on disk.

    Args:
        task (`str`): A name in `SETTINGS`.
        seed (`int`): Seed of fine-tuning, scoring and recovery.
        data_dir (`str`): Folder with `TASK/{train,validation}.parquet`.
        output_dir (`str` or `Path`): Folder of dense models and scores.
        fold (`bool`, *optional*, defaults to `False`): Whether to evaluate on a held-out part of the training split.
        model (`str`, *optional*): A name in `BASE_MODELS`.
        common (`CommonSettings`, *optional*): What all methods have in common.
    """

    def __init__(
        self,
        task: str,
        seed: int,
        data_dir: str,
        output_dir: str | Path,
        fold: bool = False,
        model: str = MINILM,
        common: CommonSettings = COMMON,
    ):
        self.name, self.seed, self.fold, self.setting, self.common = task, seed, fold, SETTINGS[task], common
        self.model, self.output_dir = model, Path(output_dir)
        self.folder = Path(model) / f"{task}-{seed}{'-fold' * fold}"
        self.base = BASE_MODELS[model].folder(self.output_dir / "downloads")
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.task = load_task(task, data_dir)
        data = self.task.tokenize(self.tokenizer, MAX_LENGTH)
        train = data["train"].shuffle(seed=0)  # The same examples for all seeds.
        self.train, self.evaluated = train, data["validation"]
        if fold:
            texts = self.task.data["train"].shuffle(seed=0)[self.task.texts[0]]
            kept, held_out = split_fold(texts, self.setting)
            self.train, self.evaluated = train.select(kept), train.select(held_out)
        examples = common.train_examples or self.setting.examples
        if examples is not None:
            if examples > len(self.train):
                raise ValueError(
                    f"`train_examples` is {examples:,}, but {task} has {len(self.train):,} to train on; ask for fewer."
                )
            self.train = self.train.select(range(examples))
        # Evaluation takes half the time on batches of similar lengths, and the trainer does not always form them.
        self.evaluated = self.evaluated.select(np.argsort([len(ids) for ids in self.evaluated["input_ids"]]))

    def dense(self) -> PreTrainedModel:
        """Loads the dense model; fine-tunes it first, if it is not on disk."""
        folder = self.output_dir / "dense" / self.folder
        if not (folder / "config.json").exists():
            set_seed(self.seed)
            model = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=self.task.num_labels)
            self.trainer(model, epochs=self.setting.epochs).train()
            unfinished = folder.with_name(folder.name + ".unfinished")
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The dense model; all cells distil from it, and it runs once on each example."""
        return remember_logits(self.dense())

    @cached_property
    def dense_metrics(self) -> dict[str, float]:
        """Metrics of the dense model; all cells start from it."""
        return self.measure(self.dense())

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """The task's metrics of a model."""
        return self._measure(self.trainer(model))

    def scored(self, score: Score) -> tuple[PreTrainedModel, Sensitivity]:
        """Loads the dense model and its scores; scores it first, if they are not on disk.

        Where dimensions of heads are scored, heads are aligned, and the model is one of the same outputs.

        Args:
            score (`Score`): The scoring method, and the kinds that are scored.
        """
        folder = self.output_dir / "scores" / self.folder / score.name
        if not folder.exists():
            trainer = self.trainer(self.dense(), HapConfig(method=score.method, components=score.components))
            unfinished = folder.with_name(folder.name + ".unfinished")
            unfinished.mkdir(parents=True, exist_ok=True)
            sensitivity = trainer.estimate_sensitivity()
            sensitivity.save(unfinished / SCORES)
            if sensitivity.basis:
                trainer.model.save_pretrained(unfinished)
            unfinished.rename(folder)
        sensitivity = Sensitivity.load(folder / SCORES)
        model = AutoModelForSequenceClassification.from_pretrained(folder) if sensitivity.basis else self.dense()
        return model, sensitivity

    def run(self, name: str, budget: str, ratio: float, recover: bool = True) -> Cell:
        """Prunes the dense model by a method and recovers it.

        Args:
            name (`str`): A name in `METHODS`.
            budget (`str`): What the ratio is a share of.
            ratio (`float`): Share to remove.
            recover (`bool`, *optional*, defaults to `True`): Whether to train after pruning.

        Returns:
            `dict[str, Any]`: The cell, as it is written to `cells.jsonl`.
        """
        method = METHODS[name]
        common = self.common
        changes = {"budget": budget, "ratio": ratio, "refit_examples": common.refit_examples, "tuning_epochs": 0}
        # All methods train on all examples, and are measured after the last step.
        changes |= {"recovery_learning_rate": common.recovery_learning_rate, "recovery_check": "none"}
        if budget not in COMPONENTS:
            changes["components"] = method.components
        dense, sensitivity = self.scored(method.score)
        trainer = self.trainer(copy.deepcopy(dense), HapConfig(**{**changes, **method.config}))
        cell = {
            "model": self.model,
            "task": self.name,
            "method": name,
            "budget": budget,
            "ratio": ratio,
            "seed": self.seed,
        }
        cell |= {"fold": self.fold, "common": asdict(common), "bf16": bf16_is_fast(), "dense": self.dense_metrics}
        cell["device"] = device_name(trainer.args.device)
        set_seed(self.seed)
        start = time.perf_counter()
        trainer.prune(method.plan(trainer, sensitivity))
        method.finish(trainer.model)
        seconds = {"score": sensitivity.seconds, "prune": time.perf_counter() - start}
        cell["pruned"] = self._measure(trainer)
        if recover:
            trainer.teacher = self.teacher
            set_seed(self.seed)  # Whatever pruning drew, the recovery's order of examples is the same.
            start = time.perf_counter()
            trainer.train()
            seconds["recover"] = time.perf_counter() - start
            cell["recovered"] = self._measure(trainer)
        cell["seconds"] = {phase: round(value, 1) for phase, value in seconds.items()}
        cell |= _kept(trainer.model, dense.config.num_hidden_layers)
        cell["parameters"] = trainer.results["parameters"]
        return cell

    def trainer(
        self, model: PreTrainedModel, hap_config: HapConfig | None = None, epochs: int | None = None
    ) -> HapTrainer:
        """A trainer that fine-tunes for some epochs; without them, one that recovers."""
        duration = {"num_train_epochs": epochs, "warmup_steps": WARMUP_STEPS}
        if epochs is None:
            steps = self.common.recovery_steps
            duration = {"max_steps": steps, "warmup_steps": steps // 10}
        args = quiet_arguments(
            self.output_dir / "trainer",
            learning_rate=BASE_MODELS[self.model].learning_rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            seed=self.seed,
            bf16=bf16_is_fast(),
            use_cpu=not torch.cuda.is_available(),
            **duration,
            **(GROUPED_BY_LENGTH if self.setting.grouped else {}),
        )
        trainer = HapTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.evaluated,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=self.task.metrics(),
            processing_class=self.tokenizer,
            hap_config=hap_config,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _measure(self, trainer: HapTrainer) -> dict[str, float]:
        return {name: round(value, 5) for name, value in quality_metrics(trainer.evaluate()).items()}


def _kept(model: PreTrainedModel, num_layers: int) -> dict[str, Any]:
    """What each layer has left: heads, neurons, ranks of implants, and ranks of heads if these got any.

    Dropped layers have none.
    """
    ranks, groups = head_ranks(model), find_groups(model)
    heads = [sum(rank > 0 for rank in layer) for layer in ranks.get("value_dims", ())]
    neurons = of_kind(groups, "neurons")
    kept = {
        "heads": heads or [group.num_components for group in of_kind(groups, "heads")],
        "neurons": [group.num_components - group.implant_rank for group in neurons],
        "implants": [group.implant_rank for group in neurons],
    }
    dropped = [0] * (num_layers - len(neurons))  # Only ever from the top.
    found: dict[str, Any] = {name: counts + dropped for name, counts in kept.items()}
    return {**found, "ranks": ranks} if ranks else found
