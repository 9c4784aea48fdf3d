"""One task and seed of a comparison: its data, its dense model, its scores, and a cell for every way to prune it."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison_methods import METHODS
from datasets import Dataset
from demo_data import demo_model_path
from remembered_teacher import RememberedTeacher
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
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.data.metrics import own_metrics
from hap_transformers.data.tasks import load_task


@dataclass
class Setting:
    """How a task is trained.

    Args:
        examples (`int`, *optional*): Training examples; by default all.
        epochs (`int`): Epochs of fine-tuning.
        held_out (`int`, *optional*): Examples that a fold holds out; by default a fifth.
        fold_words (`int`, *optional*): A fold holds out examples of at least so many words, and training leaves out
            all that contain them or are contained in them: the examples are parts of one another's sentences.
        grouped (`bool`): Whether batches have examples of like length, which saves padding. Where these come from one
            source, with scores of its own, such batches are no samples of the task, and training on them goes astray.
    """

    examples: int | None
    epochs: int
    held_out: int | None = None
    fold_words: int | None = None
    grouped: bool = True


SETTINGS = {
    "mrpc": Setting(None, 3),
    "sst2": Setting(10_000, 2, held_out=3_000, fold_words=12),
    "cola": Setting(None, 3),
    "stsb": Setting(None, 2, grouped=False),
}
LEARNING_RATE, WARMUP_STEPS = 1e-4, 50
RECOVERY_LEARNING_RATE, RECOVERY_STEPS = 5e-5, 100
MAX_LENGTH = 128


def bf16_is_fast() -> bool:
    """Whether the device multiplies bfloat16 by itself; elsewhere it is emulated, ten times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


class Job:
    """One task and seed. The dense model and scores are made when first asked for, and kept on disk.

    Args:
        task (`str`): One of `SETTINGS`.
        seed (`int`): Of fine-tuning, scoring and recovery.
        data_dir (`str`): Folder with `TASK/{train,validation}.parquet`.
        output_dir (`str` or `Path`): Where dense models and scores are kept.
        fold (`bool`, *optional*, defaults to `False`): Whether to measure on a held-out part of the training split.
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
            kept, held_out = self._fold(self.task.data["train"].shuffle(seed=0))
            self.train, self.evaluated = train.select(kept), train.select(held_out)
        if self.setting.examples is not None:
            self.train = self.train.select(range(self.setting.examples))
        # Where the trainer does not group them, batches of like length save half of the evaluation's time.
        self.evaluated = self.evaluated.select(np.argsort([len(ids) for ids in self.evaluated["input_ids"]]))

    def dense(self) -> PreTrainedModel:
        """The dense model."""
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
    def teacher(self) -> RememberedTeacher:
        """The dense model, to distil from in all cells."""
        return RememberedTeacher(self.dense())

    @cached_property
    def dense_metrics(self) -> dict[str, float]:
        """Those of the dense model, which all cells start from."""
        return self._measure(self._trainer(self.dense(), HapConfig()))

    def scores(self, method: str) -> Sensitivity:
        """Scores of the dense model by a method."""
        file = self.output_dir / "scores" / self.folder / f"{method}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            trainer = self._trainer(self.dense(), HapConfig(method=method))
            unfinished = file.with_suffix(".unfinished")
            trainer.estimate_sensitivity().save(unfinished)
            unfinished.rename(file)
        return Sensitivity.load(file)

    def run(self, name: str, budget: str, ratio: float, recover: bool = True) -> dict[str, Any]:
        """Prunes the dense model and recovers it: a cell."""
        method, dense = METHODS[name], self.dense()
        changes = {"budget": budget, "ratio": ratio, "recovery_learning_rate": RECOVERY_LEARNING_RATE}
        trainer = self._trainer(copy.deepcopy(dense), HapConfig(**{**changes, **method.config}))
        cell = {"task": self.name, "method": name, "budget": budget, "ratio": ratio, "seed": self.seed}
        cell |= {"fold": self.fold, "bf16": bf16_is_fast(), "dense": self.dense_metrics}
        sensitivity = self.scores(method.score)
        set_seed(self.seed)
        seconds = [time.perf_counter()]
        trainer.prune(method.plan(trainer, sensitivity))
        method.finish(trainer.model)
        seconds.append(time.perf_counter())
        cell["pruned"] = self._measure(trainer)
        if recover:
            trainer.teacher = self.teacher
            set_seed(self.seed)  # Whatever pruning drew, the recovery's order of examples is the same.
            seconds.append(time.perf_counter())
            trainer.train()
            seconds.append(time.perf_counter())
            cell["recovered"] = self._measure(trainer)
        phases = {"score": sensitivity.seconds, "prune": seconds[1] - seconds[0]}
        cell["seconds"] = {**phases, "recover": seconds[-1] - seconds[-2]} if recover else phases
        cell["seconds"] = {phase: round(value, 1) for phase, value in cell["seconds"].items()}
        feed_forward = feed_forward_blocks(trainer.model)
        kept = {
            "heads": [block.num_components for block in attention_blocks(trainer.model)],
            "neurons": [block.num_components - block.implant_rank for block in feed_forward],
            "implants": [block.implant_rank for block in feed_forward],
        }
        dropped = [0] * (dense.config.num_hidden_layers - len(feed_forward))  # Only ever from the top.
        cell |= {name: layers + dropped for name, layers in kept.items()}
        cell["parameters"] = trainer.results["parameters"]
        return cell

    def _fold(self, rows: Dataset) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of the examples to train on and of those held out."""
        held_out = self.setting.held_out or len(rows) // 5
        if self.setting.fold_words is None:
            return range(held_out, len(rows)), range(held_out)
        texts = [f" {' '.join(text.split())} " for text in rows[self.task.texts[0]]]
        long = [i for i, text in enumerate(texts) if len(text.split()) >= self.setting.fold_words][:held_out]
        held_texts = [texts[i] for i in long]
        joined = "|".join(held_texts)
        kept = [i for i, text in enumerate(texts) if text not in joined and not any(t in text for t in held_texts)]
        return kept, long

    def _trainer(
        self, model: PreTrainedModel, hap_config: HapConfig | None = None, epochs: int | None = None
    ) -> HapTrainer:
        """A trainer that fine-tunes for some epochs; without them, one that recovers."""
        duration = {"num_train_epochs": epochs, "warmup_steps": WARMUP_STEPS}
        if epochs is None:
            duration = {"max_steps": RECOVERY_STEPS, "warmup_steps": RECOVERY_STEPS // 10}
        grouped = {"group_by_length": True} if TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}
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
            **(grouped if self.setting.grouped else {}),
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
        return {name: round(value, 5) for name, value in own_metrics(trainer.evaluate()).items()}
