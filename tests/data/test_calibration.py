"""Examples for scoring are the same in every pass, and drawing them moves no global random state."""

import random

import numpy as np
import pytest
import torch
from trainers import Rows, make_trainer
from transformers import default_data_collator

from hap_transformers import HapConfig
from hap_transformers.data.calibration import calibration_batches, drawn_alike


def numbers():
    """The next numbers of the global random states, which stay where they are."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = torch.rand(1).item(), random.random(), np.random.rand()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    return found


def drawn(examples):
    """A collator that draws of all of them."""
    return [*examples, torch.rand(1).item(), random.random(), np.random.rand()]


def test_every_pass_draws_alike():
    first = list(drawn_alike(calibration_batches(range(9), 8, 3, 2, drawn), 5))
    before = numbers()
    loader = calibration_batches(range(9), 8, 3, 2, drawn)
    found = []
    for batch in drawn_alike(loader, 5):
        found.append(batch)
        assert numbers() == before
        torch.rand(1), random.random(), np.random.rand()  # What is drawn between batches changes none of them.
        before = numbers()
    assert found == first and len({batch[-1] for batch in found}) == 4
    assert list(drawn_alike(loader, 6)) != first


def test_a_loader_that_fails_leaves_the_random_states():
    def fail(examples):
        torch.rand(1)
        raise RuntimeError("no such file")

    before = numbers()
    with pytest.raises(RuntimeError, match="no such file"):
        list(drawn_alike(calibration_batches(range(9), 8, 3, 2, fail), 5))
    assert numbers() == before


def test_a_loader_alone_moves_no_state():
    before = numbers()
    assert len(list(calibration_batches(range(9), 8, 3, 2, list))) == 4
    assert numbers() == before


def random_tokens(examples):
    """As a collator that masks tokens does."""
    batch = default_data_collator(examples)
    return {**batch, "input_ids": torch.randint(4, 30, batch["input_ids"].shape)}


@pytest.mark.parametrize("max_memory", ["1KB", "4KB"])
def test_a_collator_that_draws_gives_the_same_scores_in_parts(tmp_path, max_memory):
    found = []
    for memory in (None, max_memory):
        config = HapConfig(ratio=0.5, max_examples=16, components=["heads", "neurons"], max_memory=memory)
        trainer = make_trainer(tmp_path, hap_config=config)
        trainer.data_collator = random_tokens
        torch.manual_seed(len(found))
        found.append(trainer.estimate_sensitivity().scores)
    for kind, scores in found[0].items():
        for one, other in zip(scores, found[1][kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_pruning_moves_no_state(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=16), rows=Rows(24))
    trainer.data_collator = random_tokens
    first, second = trainer.calibration_batches(), trainer.calibration_batches()
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    before = numbers()
    trainer.prune()
    assert numbers() == before
