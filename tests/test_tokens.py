import pytest
import torch
from zoo import ZOO

from hap_transformers import tokens


@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize("features", [0, 1, 10, 14])
def test_products_are_those_of_the_whole_matrix(features, block, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", block)
    x = torch.randn(20, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(tokens.products(x), x.T @ x)


def test_relative_distance():
    states, target = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert tokens.relative_distance(states, target).item() == pytest.approx((4 + 16) / (1 + 9 + 1))
    assert tokens.relative_distance(states, torch.zeros(2, 2)).item() == pytest.approx((1 + 4 + 9 + 25) / 4)
    nothing = torch.zeros(0, 2, requires_grad=True)
    distance = tokens.relative_distance(nothing, nothing.detach())
    distance.backward()
    assert distance.item() == 0 and nothing.grad.shape == (0, 2)


def test_a_mask_of_another_shape_is_passed_over():
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert tokens.valid_tokens(x, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert len(tokens.valid_tokens(x, mask[:, :2])) == len(tokens.valid_tokens(x, None)) == 6


def test_flat_tokens():
    """OPT's feed-forward block reads the tokens of all texts as rows of one matrix."""
    x, mask = torch.arange(12.0).view(6, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert tokens.valid_tokens(x, mask).tolist() == [[0, 1], [2, 3], [6, 7]]


def test_choices_are_examples():
    """The model sees two choices of two examples as four texts."""
    x, mask = torch.arange(12.0).view(4, 3, 1), torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]])
    assert tokens.valid_tokens(x, mask).flatten().tolist() == [0, 1, 3, 6, 7, 8, 9, 10]
    inputs = {"input_ids": torch.tensor([[[5, 6, 7], [8, 9, 7]]]), "attention_mask": torch.ones(1, 2, 3)}
    longer = tokens.with_length(inputs, 4)
    assert longer["input_ids"].tolist() == [[[5, 6, 7, 5], [8, 9, 7, 8]]]
    assert longer["attention_mask"].shape == (1, 2, 4)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "bart", "mpnet", "opt"])
def test_texts_longer_than_the_table_of_positions(model_type):
    model = ZOO[model_type].model(torch.float32, eos_token_id=2)

    def runs(length):
        ids = torch.full((1, length), 5)
        ids[:, -1] = 2
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    for length in (28, 29, 30, 31, 32, 33, 34, 35):
        if runs(length):
            tokens.validate_length(model, length)
        else:
            with pytest.raises(ValueError, match=f"takes at most .* tokens, not {length}"):
                tokens.validate_length(model, length)
    assert runs(28) and not runs(35)


def test_inputs_of_another_length():
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3), "labels": torch.tensor([1])}
    longer = tokens.with_length(inputs, 5)
    assert longer["input_ids"].tolist() == [[5, 6, 7, 5, 6]] and longer["attention_mask"].shape == (1, 5)
    assert longer["labels"] is inputs["labels"]
    assert tokens.with_length(inputs, 2)["input_ids"].tolist() == [[5, 6]]
