"""`HapTrainer` on examples without labels: scores, refit, recovery, evaluation, and what is refused."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from tiny import WHOLE_HEADS, make_batch, make_model, untouched
from torch.nn import functional as F
from torch.utils.data import default_collate
from trainers import Rows, make_trainer
from transformers import DataCollatorForLanguageModeling, Trainer
from zoo import ZOO

from hap_transformers import HapConfig, HapTrainer, HapTrainerMixin, PruningPlan, estimate_sensitivity


TEXTS = ("input_ids", "attention_mask")
# A class of models of every sort of output.
TASKS = {
    "classes": ("bert", "ForSequenceClassification"),
    "a value": ("roberta", "ForSequenceClassification"),
    "classes of images": ("vit", "ForImageClassification"),
    "tags": ("bert", "ForTokenClassification"),
    "answers": ("distilbert", "ForQuestionAnswering"),
    "masked words": ("bert", "ForMaskedLM"),
    "next words": ("gpt2", "LMHeadModel"),
    "next words of Llama": ("llama", "ForCausalLM"),
    "embeddings": ("bert", "Model"),
    "embeddings of images": ("vit", "Model"),
}
PROBLEMS = {"a value": {"num_labels": 1}}


def make_task(name):
    """A model without dropout, and examples without labels."""
    model_type, task = TASKS[name]
    tiny = dataclasses.replace(ZOO[model_type], task=task)
    model = tiny.model(torch.float32, **PROBLEMS.get(name, {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if tiny.inputs == "image":
        pictures = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return model, [{"pixel_values": picture} for picture in pictures]
    return model, Rows(labels=False).rows


def distance(name, model, dense, rows):
    """How far the outputs of tokens that count are apart, in the measure of the task."""
    batch = default_collate(rows)
    with torch.no_grad():
        found, wanted = model.eval()(**batch), dense.eval()(**batch)
    if name.startswith("embeddings"):
        pooled = []
        for outputs in (found, wanted):
            states = outputs.last_hidden_state
            mask = batch["attention_mask"][..., None] if "attention_mask" in batch else None
            pooled.append(states[:, 0] if mask is None else (states * mask).sum(1) / mask.sum(1))
        return (1 - F.cosine_similarity(*pooled)).mean().item()
    keys = [key for key in wanted if "logits" in key]
    if name == "a value":
        return (found.logits - wanted.logits).square().mean().item()
    logs = [torch.stack([outputs[key].log_softmax(-1) for key in keys]) for outputs in (found, wanted)]
    divergence = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    if divergence.shape[-1:] == batch.get("attention_mask", torch.zeros(0)).shape[-1:]:
        mask = batch["attention_mask"].bool()
        if name.startswith("next"):
            divergence, mask = divergence[..., :-1], mask[:, 1:]
        divergence = divergence[:, mask]
    return divergence.mean().item()


@pytest.mark.parametrize("name", TASKS)
def test_scored_refitted_and_recovered_by_the_dense_models_outputs(tmp_path, name):
    model, rows = make_task(name)
    dense = copy.deepcopy(model)
    settings = {"distillation": 1.0, "recovery_epochs": 8, "components": WHOLE_HEADS}
    config = HapConfig(ratio=0.5, refit=False, max_examples=12, **settings)
    settings = {"hap_config": config, "learning_rate": 1e-2, "seed": 3}
    trainer = make_trainer(tmp_path, model=model, rows=rows, **settings)
    trainer.prune()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:12]
    batches = [default_collate([rows[i] for i in part]) for part in order.split(4)]
    expected = estimate_sensitivity(dense, batches, seed=3, progress=False)
    for kind, layers in expected.scores.items():
        torch.testing.assert_close(trainer.sensitivity.scores[kind], layers, rtol=1e-4, atol=1e-9)
    before = distance(name, model, dense, rows)
    trainer.train()
    assert distance(name, trainer.model, dense, rows) < 0.6 * before
    assert trainer._has_distilled
    for key, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[key])


def test_scores_are_those_with_labels(tmp_path):
    """The curvature of a softmax does not depend on labels; the refit reads none."""
    ends = []
    for labels in (True, False):
        config = HapConfig(ratio=0.5, max_examples=12, distillation=1.0, components=WHOLE_HEADS)
        trainer = make_trainer(tmp_path, rows=Rows(labels=labels), hap_config=config)
        trainer.prune()
        ends.append((trainer.sensitivity.scores, trainer.pruning_plan.removed, trainer.model.state_dict()))
    for kind, layers in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][kind], layers, rtol=1e-4, atol=1e-7)
    assert ends[0][1] == ends[1][1]
    for name, tensor in ends[0][2].items():
        torch.testing.assert_close(tensor, ends[1][2][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["tags", "masked words", "next words", "embeddings"])
def test_padding_does_not_count(tmp_path, name):
    """Tokens behind the mask change hidden states there, and nothing else."""
    model, rows = make_task(name)
    config = HapConfig(refit=False, distillation=1.0)
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=config)
    trainer.prune(PruningPlan.for_model(model, neurons={0: range(12), 1: range(12)}))
    trainer._phase = "recovered"
    batch = default_collate(rows[:4])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    losses = []
    for token in (5, 11):
        changed = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, token)}
        torch.manual_seed(0)  # Transformers 4 drops attention whatever its modules say.
        losses.append(trainer.compute_loss(trainer.model.train(), changed).item())
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_teacher_of_ones_own_and_hidden_states(tmp_path):
    model, rows = make_task("embeddings")
    teacher = copy.deepcopy(model)
    config = HapConfig(refit=False, distillation=1.0, distillation_hidden=0.5, recovery_epochs=3)
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=config, teacher=teacher, learning_rate=1e-2)
    trainer.prune(PruningPlan.for_model(model, heads={0: [1]}, neurons={1: range(12)}))
    before = distance("embeddings", model, teacher, rows)
    trainer.train()
    assert distance("embeddings", model, teacher, rows) < before and trainer.teacher is teacher


# Evaluation


@pytest.mark.parametrize("name", ["classes", "embeddings", "next words"])
def test_evaluation_without_labels_has_no_loss(tmp_path, name):
    model, rows = make_task(name)
    config = HapConfig(ratio=0.3, distillation=1.0, max_examples=8)
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=config, max_steps=1)
    trainer.eval_dataset = rows[:8]
    assert "eval_loss" not in trainer.evaluate()
    trainer.prune()
    trainer.train()
    assert "eval_runtime" in trainer.evaluate()
    assert not any(trainer.results["metrics"].values())
    predicted = trainer.predict(rows[:8]).predictions
    assert len(predicted[0] if isinstance(predicted, tuple) else predicted) == 8
    trainer.create_model_card()
    assert "pruned" in (tmp_path / "README.md").read_text()


def test_evaluation_with_labels(tmp_path):
    config = HapConfig(ratio=0.3, distillation=1.0, max_examples=8)
    trainer = make_trainer(tmp_path, rows=Rows(labels=False), hap_config=config, max_steps=1, eval_strategy="epoch")
    trainer.prune()
    trainer.train()
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()


# What is refused


def columns(*names):
    batch = make_batch(size=24)
    return Dataset.from_dict({name: batch["labels" if "label" in name else name].tolist() for name in names})


NAMED = "have no labels, of whose loss recovery takes the share 1 - distillation = 0.5. Set distillation=1.0"


def test_columns_without_labels_are_seen_at_once(tmp_path):
    model = make_model(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"training examples of this BertForSequenceClassification {NAMED}"):
        make_trainer(tmp_path, model=model, rows=columns(*TEXTS), hap_config=HapConfig())
    assert untouched(model, before)
    make_trainer(tmp_path, rows=columns(*TEXTS), hap_config=HapConfig(distillation=1.0))
    make_trainer(tmp_path, rows=columns(*TEXTS), hap_config=HapConfig(distillation=0.0))  # For pruning alone.
    make_trainer(tmp_path, rows=columns(*TEXTS), hap_config=None)
    for name in ("label", "labels", "label_ids"):
        make_trainer(tmp_path, rows=columns(*TEXTS, name), hap_config=HapConfig())


def test_labels_that_a_collator_makes(tmp_path):
    model, rows = make_task("next words")

    def trainer_class(**given):
        tokenizer = type("Tokenizer", (), {"pad": None, "pad_token_id": 0, "mask_token": None})()
        return HapTrainer(**given, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))

    make_trainer(tmp_path, trainer_class, model=model, rows=columns(*TEXTS), hap_config=HapConfig())


@pytest.mark.parametrize("changed", [{}, {"distillation_hidden": 0.5, "distillation": 0.0}])
def test_other_examples_without_labels_are_seen_as_training_begins(tmp_path, changed):
    config = HapConfig(**{"ratio": 0.5, "max_examples": 8, **changed})
    trainer = make_trainer(tmp_path, rows=Rows(labels=False), hap_config=config)
    trainer.prune()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="Set distillation=1.0 to train on the dense model's outputs alone"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    trainer.hap_config.distillation = 1.0
    trainer.train()
    assert not all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_dense_model_has_nothing_to_train_on(tmp_path):
    trainer = make_trainer(tmp_path, rows=Rows(labels=False), hap_config=HapConfig(distillation=1.0))
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()


def test_methods_that_need_labels_say_so(tmp_path):
    config = HapConfig(method="gradient", distillation=1.0, max_examples=8)
    trainer = make_trainer(tmp_path, rows=Rows(labels=False), hap_config=config)
    with pytest.raises(ValueError) as of_trainer:
        trainer.prune()
    with pytest.raises(ValueError) as of_function:
        estimate_sensitivity(trainer.model, [make_batch() | {"labels": None}], "gradient", progress=False)
    assert str(of_trainer.value).partition(":")[0] == str(of_function.value).partition(":")[0]


def test_outputs_without_names_are_refused(tmp_path):
    model = make_model(dtype=torch.float32, return_dict=False)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model=model, rows=Rows(labels=False), hap_config=HapConfig(distillation=1.0))
    with pytest.raises(ValueError, match="returns a tuple, in which logits have no name.*config.return_dict=True"):
        trainer.prune()
    assert untouched(model, before)


# Losses that need no labels


class TwoViews(Trainer):
    """Its loss compares the logits of a text with those of the text read backwards."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        TwoViews.calls += 1
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Pruned(HapTrainerMixin, TwoViews):
    pass


def test_a_trainers_own_loss_without_labels_is_scored_and_distilled(tmp_path):
    config = HapConfig(ratio=0.5, method="gradient", max_examples=8, distillation=0.5)
    trainer = make_trainer(tmp_path, Pruned, rows=columns(*TEXTS), hap_config=config)
    trainer.train()
    steps = TwoViews.calls
    assert steps == 6
    trainer.prune()
    assert TwoViews.calls > steps and trainer.sensitivity.num_examples == 8
    steps = TwoViews.calls
    trainer.train()
    assert TwoViews.calls == steps + 6 and trainer._has_distilled


def test_a_loss_function_that_needs_no_labels(tmp_path):
    def trainer_class(**given):
        def loss(outputs, labels, num_items_in_batch=None):
            assert labels is None
            return outputs.logits.square().mean()

        return HapTrainer(**given, compute_loss_func=loss)

    config = HapConfig(ratio=0.5, max_examples=8, distillation=0.5)
    trainer = make_trainer(tmp_path, trainer_class, rows=columns(*TEXTS), hap_config=config, max_steps=2)
    trainer.train()
    trainer.prune()
    trainer.train()
    assert trainer._has_distilled
