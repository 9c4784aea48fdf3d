"""One task and seed of a comparison: its data, its dense model, its scores, and a cell for each method."""

import copy
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from hap_transformers import HapConfig, HapTrainer, Sensitivity
from hap_transformers.components.groups import find_groups, of_kind
from hap_transformers.components.releases import GROUPED_BY_LENGTH
from hap_transformers.data.demo import demo_model_path
from hap_transformers.data.metrics import quality_metrics
from hap_transformers.data.tasks import load_task
from hap_transformers.efficiency import bf16_is_fast

from .cells import Cell
from .folds import split_fold
from .methods import METHODS
from .remembered_teacher import remember_logits
from .settings import (
    COMPONENTS,
    LEARNING_RATE,
    MAX_LENGTH,
    RECOVERY_LEARNING_RATE,
    RECOVERY_STEPS,
    REFIT_EXAMPLES,
    SETTINGS,
    WARMUP_STEPS,
)


class Job:
    """One task and seed. The dense model and the scores are made when first asked for, and kept on disk.

    Args:
        task (`str`): A name in `SETTINGS`.
        seed (`int`): Seed of fine-tuning, scoring and recovery.
        data_dir (`str`): Folder with `TASK/{train,validation}.parquet`.
        output_dir (`str` or `Path`): Folder of dense models and scores.
        fold (`bool`, *optional*, defaults to `False`): Whether to evaluate on a held-out part of the training split.
    """

    def __init__(self, task: str, seed: int, data_dir: str, output_dir: str | Path, fold: bool = False):
        self.name, self.seed, self.fold, self.setting = task, seed, fold, SETTINGS[task]
        self.output_dir, self.folder = Path(output_dir), f"{task}-{seed}{'-fold' * fold}"
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        self.task = load_task(task, data_dir)
        data = self.task.tokenize(self.tokenizer, MAX_LENGTH)
        train = data["train"].shuffle(seed=0)  # The same examples for all seeds.
        self.train, self.evaluated = train, data["validation"]
        if fold:
            texts = self.task.data["train"].shuffle(seed=0)[self.task.texts[0]]
            kept, held_out = split_fold(texts, self.setting)
            self.train, self.evaluated = train.select(kept), train.select(held_out)
        if self.setting.examples is not None:
            self.train = self.train.select(range(self.setting.examples))
        # Evaluation takes half the time on batches of similar lengths, and the trainer does not always form them.
        self.evaluated = self.evaluated.select(np.argsort([len(ids) for ids in self.evaluated["input_ids"]]))

    def dense(self) -> PreTrainedModel:
        """Loads the dense model; fine-tunes it first, if it is not on disk."""
        folder = self.output_dir / "dense" / self.folder
        if not (folder / "config.json").exists():
            set_seed(self.seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                demo_model_path(), num_labels=self.task.num_labels
            )
            self._trainer(model, epochs=self.setting.epochs).train()
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
        return self._measure(self._trainer(model))

    def scores(self, method: str) -> Sensitivity:
        """Loads the dense model's scores by a method; scores it first, if they are not on disk."""
        file = self.output_dir / "scores" / self.folder / f"{method}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            trainer = self._trainer(self.dense(), HapConfig(method=method, components=COMPONENTS))
            unfinished = file.with_suffix(".unfinished")
            trainer.estimate_sensitivity().save(unfinished)
            unfinished.rename(file)
        return Sensitivity.load(file)

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
        method, dense = METHODS[name], self.dense()
        changes = {"budget": budget, "ratio": ratio, "refit_examples": REFIT_EXAMPLES}
        # All methods train on all examples, and are measured after the last step.
        changes |= {"recovery_learning_rate": RECOVERY_LEARNING_RATE, "recovery_check": "none"}
        if budget not in COMPONENTS:
            changes["components"] = COMPONENTS
        trainer = self._trainer(copy.deepcopy(dense), HapConfig(**{**changes, **method.config}))
        cell = {"task": self.name, "method": name, "budget": budget, "ratio": ratio, "seed": self.seed}
        cell |= {"fold": self.fold, "bf16": bf16_is_fast(), "dense": self.dense_metrics}
        sensitivity = self.scores(method.score)
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

    def _trainer(
        self, model: PreTrainedModel, hap_config: HapConfig | None = None, epochs: int | None = None
    ) -> HapTrainer:
        """A trainer that fine-tunes for some epochs; without them, one that recovers."""
        duration = {"num_train_epochs": epochs, "warmup_steps": WARMUP_STEPS}
        if epochs is None:
            duration = {"max_steps": RECOVERY_STEPS, "warmup_steps": RECOVERY_STEPS // 10}
        args = TrainingArguments(
            output_dir=str(self.output_dir / "trainer"),
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            seed=self.seed,
            bf16=bf16_is_fast(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
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


def _kept(model: PreTrainedModel, num_layers: int) -> dict[str, list[int]]:
    """Heads, neurons and ranks of implants that each layer has left; dropped layers have none."""
    heads, neurons = (of_kind(find_groups(model), kind) for kind in ("heads", "neurons"))
    kept = {
        "heads": [group.num_components for group in heads],
        "neurons": [group.num_components - group.implant_rank for group in neurons],
        "implants": [group.implant_rank for group in neurons],
    }
    dropped = [0] * (num_layers - len(neurons))  # Only ever from the top.
    return {name: counts + dropped for name, counts in kept.items()}
