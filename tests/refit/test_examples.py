"""A refit reads many short examples, or as many long ones as scoring reads."""

import pytest
import torch

from hap_transformers.refit.examples import TOKENS, refit_batches


def texts(length, count, batch=8):
    for _ in range(count // batch):
        ids = torch.ones(batch, length, dtype=torch.long)
        yield {"input_ids": ids, "attention_mask": ids}


@pytest.mark.parametrize(
    ("length", "read"),
    [(16, 512), (512, TOKENS // 512), (1024, TOKENS // 1024), (4096, 64)],
    ids=["all", "as many as fit", "fewer", "at least as many as are scored"],
)
def test_counts_tokens(length, read):
    examples = sum(len(batch["input_ids"]) for batch in refit_batches(texts(length, 512), most=512, least=64))
    assert examples == read


def test_padding_does_not_count():
    batches = [{**batch, "attention_mask": torch.eye(8, 4096, dtype=torch.long)} for batch in texts(4096, 128)]
    assert len(list(refit_batches(batches, most=512, least=64))) == 16


def test_images_count_alike():
    images = [{"pixel_values": torch.zeros(8, 3, 2, 2)}] * 100
    assert 8 * len(list(refit_batches(images, most=800, least=64))) == TOKENS // 256


def test_the_last_batch_is_cut():
    assert [len(batch["input_ids"]) for batch in refit_batches(texts(4, 24), most=20, least=20)] == [8, 8, 4]
