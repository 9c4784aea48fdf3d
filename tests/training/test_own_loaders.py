"""Scoring and refit take their batches from where training takes them, prepared in the same way."""

import types

import pytest
import torch
from torch.utils.data import DataLoader
from trainers import Rows, make_trainer

from hap_transformers import HapConfig, HapTrainer


CONFIG = HapConfig(ratio=0.5, max_examples=6)
ROWS = Rows().rows
LAST = {name: torch.stack([row[name] for row in ROWS[-6:]]) for name in ROWS[0]}


class ByGetDataloader(HapTrainer):
    """Overrides what `Trainer.get_train_dataloader` calls."""

    def _get_dataloader(self, dataset, *args, **kwargs):
        return DataLoader(list(reversed(dataset.rows)), 6)


def of_class(folder):
    return make_trainer(folder, ByGetDataloader, hap_config=CONFIG, max_steps=1)


def of_instance(folder):
    trainer = make_trainer(folder, hap_config=CONFIG, max_steps=1)
    trainer.get_train_dataloader = lambda: DataLoader(list(reversed(ROWS)), 6)
    return trainer


def bound_to_instance(folder):
    trainer = make_trainer(folder, hap_config=CONFIG, max_steps=1)
    trainer.get_train_dataloader = types.MethodType(lambda self: DataLoader(list(reversed(ROWS)), 6), trainer)
    return trainer


@pytest.mark.parametrize("make", [of_class, of_instance, bound_to_instance], ids=lambda make: make.__name__)
def test_the_loader_that_training_uses_is_scored(make, tmp_path):
    trainer = make(tmp_path)
    (found,) = trainer.calibration_batches()
    assert all(torch.equal(value, LAST[name].flip(0)) for name, value in found.items())
    trainer.train()
    assert trainer.prune().count("neurons")


def test_the_default_loader_is_a_sample_in_another_order(tmp_path):
    (found,) = make_trainer(tmp_path, hap_config=HapConfig(max_examples=4)).calibration_batches()
    assert not torch.equal(found["input_ids"], LAST["input_ids"][:4])


class Once(torch.utils.data.IterableDataset):
    """Gives its rows a single time."""

    def __init__(self):
        self.rows = iter(ROWS)

    def __iter__(self):
        return self.rows


def test_a_data_set_that_can_be_read_once_is_named(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=CONFIG, max_steps=1)
    trainer.train_dataset = Once()
    with pytest.raises(ValueError, match="a Once, gives no examples, or none a second time"):
        trainer.prune()


def test_batches_of_tuples_are_prepared_once(tmp_path):
    prepared = []

    class Tuples(HapTrainer):
        def get_train_dataloader(self):
            return DataLoader([tuple(row.values()) for row in ROWS], 6)

        def _prepare_inputs(self, inputs):
            if not isinstance(inputs, dict):
                assert isinstance(inputs, list | tuple)
                prepared.append(len(inputs[0]))
                inputs = dict(zip(ROWS[0], inputs, strict=True))
            return super()._prepare_inputs(inputs)

    trainer = make_trainer(tmp_path, Tuples, hap_config=HapConfig(ratio=0.5, max_examples=10), max_steps=1)
    trainer.train()
    del prepared[:]
    first, second = trainer.calibration_batches()
    assert set(prepared) == {6} and (len(first["labels"]), len(second["labels"])) == (6, 4)
    assert torch.equal(first["input_ids"], torch.stack([row["input_ids"] for row in ROWS[:6]]))
    trainer.prune()
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
