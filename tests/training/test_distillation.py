"""Distillation losses equal their definitions."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from hap_transformers.training.distillation import distillation_loss, hidden_loss, hidden_states


T = 2.0


def random_logits(*shape):
    generator = torch.Generator().manual_seed(0)
    return [{"logits": torch.randn(*shape, generator=generator)} for _ in range(2)]


def test_classes():
    student, target = random_logits(4, 3)
    expected = kl_divergence(
        Categorical(logits=target["logits"] / T), Categorical(logits=student["logits"] / T)
    ).mean()
    torch.testing.assert_close(distillation_loss(student, target, T), T**2 * expected)
    assert distillation_loss(student, student, T).abs() < 1e-6


def test_several_labels_at_once():
    """A shift of all logits changes independent labels, but not classes."""
    student, target = random_logits(4, 3)
    loss = distillation_loss(student, target, T, problem_type="multi_label_classification")
    expected = kl_divergence(Bernoulli(logits=target["logits"] / T), Bernoulli(logits=student["logits"] / T)).mean()
    torch.testing.assert_close(loss, T**2 * expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs):
    student, target = random_logits(4, outputs)
    loss = distillation_loss(student, target, T, problem_type="regression")
    torch.testing.assert_close(loss, (student["logits"] - target["logits"]).square().mean() / 2)


@pytest.mark.parametrize("size", [1, 4])
def test_a_logit_an_example(size):
    """Of models that drop the dimension of their single output."""
    (student, target), labels = random_logits(size), torch.zeros(size)
    wanted = (student["logits"] - target["logits"]).square().mean() / 2
    torch.testing.assert_close(distillation_loss(student, target, T, labels=labels), wanted)
    torch.testing.assert_close(distillation_loss(student, target, T), wanted)
    coins = (Bernoulli(logits=of["logits"] / T) for of in (target, student))
    wanted = T**2 * kl_divergence(*coins).mean()
    torch.testing.assert_close(distillation_loss(student, target, T, labels=labels.long()), wanted)


def test_several_outputs():
    """Question answering: the mean over starts and ends."""
    (student, target), both = random_logits(4, 7), []
    for name in ("start_logits", "end_logits"):
        both.append({name: student["logits"]})
    targets = {name: target["logits"] for name in ("start_logits", "end_logits")}
    students = {**both[0], **both[1]}
    torch.testing.assert_close(distillation_loss(students, targets, T), distillation_loss(student, target, T))
    with pytest.raises(ValueError, match="Nothing to distil"):
        distillation_loss({}, targets, T)


@pytest.mark.parametrize("shifted", [False, True])
def test_positions_without_labels_do_not_count(shifted):
    student, target = random_logits(2, 4, 3)
    labels = torch.tensor([[-100, 0, 1, -100], [-100, -100, 2, 1]])
    picked = torch.tensor([[0, 1], [0, 2], [1, 2], [1, 3]])
    if shifted:  # The previous position predicts the label.
        picked[:, 1] -= 1
    parts = [{"logits": outputs["logits"][picked[:, 0], picked[:, 1]]} for outputs in (student, target)]
    loss = distillation_loss(student, target, T, labels=labels, shifted=shifted)
    torch.testing.assert_close(loss, distillation_loss(*parts, T))


def test_nothing_to_count_is_nothing_to_learn():
    student, target = random_logits(2, 4, 3)
    student["logits"].requires_grad_()
    loss = distillation_loss(student, target, T, labels=torch.full((2, 4), -100))
    loss.backward()
    assert loss == 0 and not student["logits"].grad.any()


def test_a_target_of_a_regression_may_be_any_number():
    """-100 says that a label does not count only where labels are whole numbers."""
    student, target = torch.tensor([[0.0], [5.0]]), torch.zeros(2, 1)
    found = distillation_loss({"logits": student}, {"logits": target}, 1.0, labels=torch.tensor([1.0, -100.0]))
    torch.testing.assert_close(found, torch.tensor(6.25))


def test_hidden_states_without_padding():
    student, target = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    a, b = student[mask.bool()], target[mask.bool()]
    expected = (a - b).square().sum() / b.square().sum()
    torch.testing.assert_close(hidden_loss([student], [target], mask), expected)


def test_a_logit_a_token():
    """ELECTRA's discriminator classifies each token with one logit."""
    student, target = torch.zeros(2, 3), torch.tensor([[3.0, 3, 3], [-1, 2, 9]])
    labels = torch.tensor([[0, 1, 0], [1, 1, -100]])
    found = distillation_loss({"logits": student}, {"logits": target}, 2.0, labels=labels)
    p = (target.flatten()[:5] / 2).sigmoid()
    divergence = p * (p / 0.5).log() + (1 - p) * ((1 - p) / 0.5).log()
    torch.testing.assert_close(found, 4 * divergence.mean())


def test_outputs_without_names_or_hidden_states():
    with pytest.raises(ValueError, match="returns a tuple, .*config.return_dict=True.*distillation_hidden=0"):
        hidden_states((torch.zeros(2, 2),))
    with pytest.raises(ValueError, match="have no hidden states. Set distillation_hidden=0"):
        hidden_states({"logits": torch.zeros(2, 2)})
