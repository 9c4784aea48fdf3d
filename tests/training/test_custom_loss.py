"""Custom losses: scoring, refit and distillation use them as `Trainer` does."""

import collections
import copy

import pytest
import torch
from tiny import make_model
from torch.nn import functional as F
from trainers import Rows, make_trainer
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.training.custom_loss import averages_over_batches, counting_items
from hap_transformers.training.recovery import with_distillation


def with_loss(tmp_path, function, **arguments):
    def trainer_class(**given):
        return HapTrainer(**given, compute_loss_func=function)

    return make_trainer(tmp_path, trainer_class, **arguments)


def mean_of_counted(outputs, labels, num_items_in_batch):
    """The model's loss, except that it needs the number of labels, which `Trainer` passes only in training."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


DISTILLED = HapConfig(ratio=0.5, budget="heads", distillation=0.5, max_examples=12)
# The tuple of a model that gets no labels.
Named = collections.namedtuple("Named", "logits")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_that_must_be_told_the_number_of_labels(tmp_path, steps):
    config = HapConfig(ratio=0.5, budget="heads", method="gauss_newton_trace", max_examples=24)
    settings = {"hap_config": config, "gradient_accumulation_steps": steps, "seed": 1}
    usual, custom = make_trainer(tmp_path, **settings), with_loss(tmp_path, mean_of_counted, **settings)
    for trainer in (usual, custom):
        trainer.prune()
        torch.manual_seed(0)
        trainer.train()
    for a, b in zip(usual.sensitivity.heads, custom.sensitivity.heads, strict=True):
        torch.testing.assert_close(a, b)
    for name, tensor in usual.model.state_dict().items():
        torch.testing.assert_close(tensor, custom.model.state_dict()[name], rtol=1e-3, atol=1e-4)


class NumberAnExample(BertForSequenceClassification):
    """A regression that drops the dimension of its single output."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids, attention_mask).logits[:, 0]
        return SequenceClassifierOutput(None if labels is None else F.mse_loss(logits, labels.float()), logits)


def test_logits_of_one_dimension(tmp_path):
    model = NumberAnExample(make_model().config).float()
    rows = [{**row, "labels": row["labels"].float()} for row in Rows().rows]
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=DISTILLED)
    trainer.train()
    trainer.prune()
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_labels_of_minus_100_do_not_count():
    told = []
    counted = counting_items(lambda outputs, labels, num_items_in_batch: told.append(num_items_in_batch))
    labels = torch.tensor([[1, -100], [-100, 0], [1, 1]])
    counted(None, labels)
    counted(None, labels, num_items_in_batch=9)
    counted(None, None)
    assert told == [4, 9, None]


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_labels_that_only_the_own_loss_understands(tmp_path, budget):
    """Neither the model nor the teacher gets labels that `Trainer` would withhold."""
    rows = Rows()
    for row in rows.rows[::2]:
        row["labels"] = torch.tensor(-1)

    def ignoring(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, ignore_index=-1, reduction="sum") / num_items_in_batch

    config = HapConfig(ratio=0.3, budget=budget, method="gradient", max_examples=24)
    trainer = with_loss(tmp_path, ignoring, rows=rows, hap_config=config)
    trainer.train()
    trainer.prune()
    trainer.train()
    assert trainer.state.global_step == 6


class Alone(HapTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Extended(HapTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


def with_small_logits(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels) + 0.1 * outputs.logits.square().mean()


class Regularized(HapTrainer):
    """The same loss, computed from the outputs that the trainer returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_adds_to_the_loss_what_it_computes_from_the_outputs(tmp_path):
    settings = {"hap_config": HapConfig(ratio=0.5, max_examples=12, method="gauss_newton_trace")}
    trainers = make_trainer(tmp_path, Regularized, **settings), with_loss(tmp_path, with_small_logits, **settings)
    usual, regularized, custom = (t.estimate_sensitivity() for t in (make_trainer(tmp_path, **settings), *trainers))
    for a, b, c in zip(usual.neurons, regularized.neurons, custom.neurons, strict=True):
        torch.testing.assert_close(b, c)
        assert not torch.allclose(a, b)
    trainers[0].prune()
    trainers[0].train()


def test_such_a_subclass_without_labels(tmp_path):
    config = HapConfig(ratio=0.5, max_examples=12, distillation=1.0)
    trainer = make_trainer(tmp_path, Regularized, rows=Rows(labels=False), hap_config=config)
    trainer.prune()
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    "trainer_class, config, warnings", [(Alone, {}, 1), (Alone, {"distillation": 0.0}, 0), (Extended, {}, 0)]
)
def test_a_subclass_that_does_not_distil_is_told_so(tmp_path, monkeypatch, trainer_class, config, warnings):
    from hap_transformers.training import trainer as module

    told = []
    monkeypatch.setattr(module.logger, "warning", told.append)
    trainer = make_trainer(tmp_path, trainer_class, hap_config=HapConfig(ratio=0.5, budget="heads", **config))
    trainer.train()
    trainer.prune()
    trainer.train()
    assert len(told) == warnings and all(
        f"{trainer_class.__name__}.compute_loss does not call" in text for text in told
    )


def test_who_divides_by_accumulated_batches(tmp_path):
    """The rule is that of `Trainer.training_step`."""
    trainer = make_trainer(tmp_path)
    trainer.model_accepts_loss_kwargs = False
    assert averages_over_batches(trainer, 8) and averages_over_batches(trainer, None)
    trainer.model_accepts_loss_kwargs = True
    assert averages_over_batches(trainer, None) and not averages_over_batches(trainer, 8)
    trainer.compute_loss_func = mean_of_counted
    assert not averages_over_batches(trainer, None)
    for declared in (True, False):  # The subclass's attribute takes precedence.
        trainer.loss_is_scaled_for_ga = declared
        assert averages_over_batches(trainer, None) is not declared


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_several_labels_at_once_are_distilled_by_sigmoids(tmp_path, shift):
    """A custom loss never writes into the config that there are several labels."""
    model = make_trainer(tmp_path).model
    assert model.config.problem_type is None
    logits = torch.tensor([[0.5, -1.0, 2.0]])
    outputs, targets = {"logits": logits + shift}, {"logits": logits}
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    loss = with_distillation(torch.tensor(0.0), outputs, targets, labels, {}, model, HapConfig(distillation=1.0))
    p, q = (torch.sigmoid(x / 2) for x in (logits, logits + shift))
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(loss, 4 * divergence.mean())


def of_tuples(outputs, labels, num_items_in_batch):
    return mean_of_counted(Named(*outputs), labels, num_items_in_batch)


@pytest.mark.parametrize(
    "losses", [(None, None), (mean_of_counted, of_tuples)], ids=["the model's loss", "custom loss"]
)
def test_tuples_are_distilled_as_named_outputs_are(tmp_path, losses):
    """Positions in a tuple must mean the same for model and teacher."""
    trained = []
    for return_dict, loss in zip((True, False), losses, strict=True):
        trainer = with_loss(tmp_path, loss, model=make_model(dtype=torch.float32), hap_config=DISTILLED, seed=1)
        trainer.model.config.return_dict = return_dict
        trainer.prune()
        torch.manual_seed(0)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name])
