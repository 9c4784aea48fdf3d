"""A `HapTrainer` of a tiny model, with data, that tests share."""

import dataclasses

import torch
from tiny import make_batch, make_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hap_transformers import HapConfig, HapTrainer


class Rows(Dataset):
    """Sentences whose first token decides the class."""

    def __init__(self, size=24, labels=True):
        batch = make_batch(size=size)
        batch["labels"] = (batch["input_ids"][:, 0] > 20).long()
        names = batch if labels else [name for name in batch if name != "labels"]
        self.rows = [{name: batch[name][i] for name in names} for i in range(size)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(tmp_path, trainer_class=HapTrainer, model=None, rows=None, callbacks=None, **arguments):
    """A trainer of a tiny BERT; `arguments` are those of `TrainingArguments`, `teacher` and `hap_config`.

    Recovery is only watched if `watched`: most tests look at weights after its last step, or train on all rows.
    """
    teacher, watched = arguments.pop("teacher", None), arguments.pop("watched", False)
    hap_config = arguments.pop("hap_config", HapConfig(ratio=0.5, budget="heads"))
    if hap_config is not None and not watched:
        hap_config = dataclasses.replace(hap_config, recovery_check="none")
    hap = {} if trainer_class is Trainer else {"hap_config": hap_config, "teacher": teacher}
    defaults = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "disable_tqdm": True}
    defaults |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), **{**defaults, **arguments})
    return trainer_class(
        model=model or make_model(dtype=torch.float32),
        args=args,
        train_dataset=rows or Rows(),
        eval_dataset=Rows(8),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=callbacks,
        **hap,
    )
