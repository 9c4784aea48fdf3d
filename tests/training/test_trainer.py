"""`HapTrainer` is `Trainer` plus scoring, pruning, refit and recovery."""

import copy

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from tiny import DIMENSIONS, make_batch, make_model
from trainers import Rows, make_trainer
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
)
from zoo import HEADS

from hap_transformers import (
    HapCallback,
    HapConfig,
    HapTrainer,
    PruningPlan,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
)
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.efficiency import count_flops


def plan_of_heads(removed, model_type="bert"):
    """A plan for a model with two layers, whether it fits or not."""
    return PruningPlan({"heads": removed}, model_type, {"heads": [HEADS, HEADS]})


def test_without_config_it_is_trainer(tmp_path):
    results = []
    for trainer_class in (Trainer, HapTrainer):
        trainer = make_trainer(tmp_path / trainer_class.__name__, trainer_class, hap_config=None)
        trainer.train()
        results.append((trainer.predict(Rows(8)).predictions, trainer.evaluate()["eval_accuracy"]))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    with pytest.raises(ValueError, match="hap_config"):
        trainer.prune()


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"torch_compile": False}], ids=str
)
def test_the_whole_road(tmp_path, arguments):
    trainer = make_trainer(tmp_path, **arguments)
    trainer.train()
    plan = trainer.prune()
    assert plan.count("heads") == HEADS and plan == trainer.pruning_plan
    assert trainer.optimizer is None and trainer.lr_scheduler is None and trainer.model_wrapped is trainer.model
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.train()
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == set(trainer.model.parameters())
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    trainer.save_model()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = make_trainer(tmp_path / "again", model=reloaded)
    assert np.allclose(again.predict(Rows(8)).predictions, trainer.predict(Rows(8)).predictions, atol=0.05)
    again.train()
    again.prune(plan_of_heads({0: [0, 1]}))
    again.train()
    assert {0, 1} <= set(again.model.config.pruned_heads[0])


@pytest.mark.parametrize("method", ["gauss_newton_trace", "hessian_trace"])
def test_scores_with_compute_loss_on_the_seeded_examples(tmp_path, method):
    """The trainer's scores are those of `estimate_sensitivity` on the same rows and loss."""

    class Tripled(HapTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 3 * model(**inputs).loss

    config = HapConfig(method=method, budget="heads", num_probes=2, max_examples=6)
    trainer = make_trainer(tmp_path, Tripled, hap_config=config, seed=7)
    rows, order = Rows().rows, torch.randperm(24, generator=torch.Generator().manual_seed(7))[:6]
    batches = [{k: torch.stack([rows[i][k] for i in part]) for k in rows[0]} for part in (order[:4], order[4:])]
    model = make_model(dtype=torch.float32)
    settings = {"components": ["heads"], "num_probes": 2, "seed": 7, "progress": False}
    expected = estimate_sensitivity(model, batches, method, **settings)
    for scores, reference in zip(trainer.estimate_sensitivity().heads, expected.heads, strict=True):
        torch.testing.assert_close(scores, 3 * reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_steps", [-1, 4])
def test_recovery_settings_hold_after_pruning_only(tmp_path, max_steps):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((state.max_steps, args.learning_rate))

    config = HapConfig(ratio=0.5, budget="heads", recovery_epochs=2, recovery_learning_rate=5e-4)
    trainer = make_trainer(tmp_path, hap_config=config, callbacks=[Watch()])
    trainer.args.max_steps = max_steps
    trainer.train()
    trainer.prune()
    trainer.train()
    assert seen == [(4 if max_steps > 0 else 6, 1e-3), (12, 5e-4)]
    assert (trainer.args.num_train_epochs, trainer.args.learning_rate, trainer.args.max_steps) == (1, 1e-3, max_steps)


@pytest.mark.parametrize(
    "plan, message",
    [
        (plan_of_heads({0: [0], 5: [0]}), "layer 5"),
        (plan_of_heads({0: [0]}, "electra"), "The plan is for a 'electra'"),
    ],
)
def test_a_wrong_plan_changes_nothing(tmp_path, plan, message):
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.prune(plan)
    assert trainer.optimizer is not None and trainer.pruning_plan is None
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_data_that_cannot_be_scored(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = Rows(0)
    with pytest.raises(ValueError, match="the train_dataset is empty"):
        trainer.prune()
    assert not getattr(trainer.model.config, "pruned_heads", None)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="pass train_dataset"):
        trainer.prune()
    trainer.hap_config = HapConfig(ratio=0.5, method="magnitude", components=["heads", "neurons"], refit=False)
    trainer.prune()  # This needs no data.
    assert trainer.pruning_plan.count("neurons")


def test_an_unknown_architecture_is_refused_at_once(tmp_path):
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=40)
    with pytest.raises(ValueError, match="BloomForSequenceClassification has model type 'bloom'"):
        make_trainer(tmp_path, model=BloomForSequenceClassification(config))


def test_metrics_and_costs_are_kept_for_the_card(tmp_path):
    trainer = make_trainer(tmp_path)
    dense = trainer.evaluate()
    trainer.prune()
    pruned = trainer.evaluate()
    trainer.train()
    recovered = trainer.evaluate()
    kept = {
        phase: {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}
        for phase, metrics in (("dense", dense), ("pruned", pruned), ("recovered", recovered))
    }
    assert trainer.results["metrics"] == kept
    parameters = sum(p.numel() for p in trainer.model.parameters())
    # Half the heads: 4 rows (columns) of 16 weights in 4 projections and 3 biases of 4, for each.
    assert trainer.results["parameters"] == {"dense": parameters + HEADS * (4 * 4 * 16 + 12), "pruned": parameters}
    assert trainer.results["flops"]["pruned"] < trainer.results["flops"]["dense"]
    assert set(trainer.results["latency_ms"]) == {"dense", "pruned"}


def test_pruned_twice_the_card_tells_of_the_last(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.25, budget="heads"))
    trainer.evaluate()
    trainer.prune()
    trainer.train()
    trainer.evaluate()
    dense = dict(trainer.results["parameters"])["dense"]
    trainer.hap_config.ratio = 0.5
    trainer.prune()
    assert set(trainer.results["metrics"]) == {"dense"}
    pruned = sum(p.numel() for p in trainer.model.parameters())
    assert trainer.results["parameters"] == {"dense": dense, "pruned": pruned}
    again = make_trainer(tmp_path, model=trainer.model)
    again.prune(PruningPlan.for_model(trainer.model, heads={0: [0, 1, 2]}))
    assert "dense" not in again.results["parameters"]


def test_costs_are_measured_by_the_trainers_own_loss(tmp_path):
    class Weighted(HapTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {name: value for name, value in inputs.items() if name != "weight"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = Rows()
    for row in rows.rows:
        row["weight"] = torch.tensor(1.0)
    trainer = make_trainer(tmp_path, Weighted, rows=rows, remove_unused_columns=False)
    trainer.prune()
    assert trainer.results["flops"]["pruned"] < trainer.results["flops"]["dense"]


def test_half_the_encoder_goes_and_what_is_left_is_refitted(tmp_path):
    """The defaults equal the same steps by hand."""
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=12, refit_examples=12), seed=3)
    model = copy.deepcopy(trainer.model)
    plan = trainer.prune()
    assert plan.neurons and plan.promise["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    rows, order = Rows().rows, torch.randperm(24, generator=torch.Generator().manual_seed(3))[:12]
    batches = [{k: torch.stack([rows[i][k] for i in order[j : j + 4]]) for k in rows[0]} for j in (0, 4, 8)]
    align_heads(model, batches, seed=3, progress=False)
    dense = copy.deepcopy(model)
    sensitivity = estimate_sensitivity(model, batches, components=DIMENSIONS, seed=3, progress=False)
    assert plan_pruning(sensitivity, model, ratio=0.5) == plan
    apply_plan(model, plan)
    reconstruct(model, dense, batches, progress=False)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", ["flops", "latency"])
def test_other_budgets(tmp_path, budget):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.3, budget=budget, sequence_length=6, refit=False))
    plan = trainer.prune()
    assert plan.promise[budget] > 0 and (trainer.latency_table is not None) == (budget == "latency")
    if budget == "flops":
        assert plan.promise["flops"] == count_flops(trainer.model, {"input_ids": torch.ones(1, 6, dtype=torch.long)})


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_distillation_alone_leads_to_the_teacher(tmp_path, arguments):
    """Labels carry no information here: only the teacher's logits and hidden states train the model."""

    def distance(trainer, dense):
        batch = make_batch(16)
        with torch.no_grad():
            logits = [model.eval()(**batch).logits.log_softmax(-1) for model in (trainer.model, dense)]
        return torch.nn.functional.kl_div(*logits, log_target=True, reduction="batchmean").item()

    config = HapConfig(ratio=0.6, refit=False, distillation=1.0, distillation_hidden=0.1, recovery_epochs=20)
    dense = make_model(dtype=torch.float32)
    dense.classifier.weight.data *= -20
    trainer = make_trainer(tmp_path, hap_config=config, teacher=copy.deepcopy(dense), learning_rate=1e-2, **arguments)
    trainer.prune()
    before = distance(trainer, dense)
    trainer.train()
    assert distance(trainer, dense) < 0.5 * before
    assert trainer.teacher is not trainer.model
    assert all(
        p.requires_grad and p.grad is None for p in trainer.teacher.parameters()
    )  # The teacher can be pruned next.
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name])
    trainer.save_model()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 8 * trainer.model.num_parameters()


def test_accumulated_batches_distil_as_one(tmp_path):
    """Two batches of four give the gradient of one batch of eight."""
    trained = []
    for arguments in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8}):
        config = HapConfig(refit=False, distillation=0.5)
        model = make_model(dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        options = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
        if TRANSFORMERS_4:
            del options["train_sampling_strategy"]
        trainer = make_trainer(tmp_path, hap_config=config, model=model, **options, **arguments)
        trainer.prune(PruningPlan.for_model(model, heads={0: [1]}, neurons={1: range(12)}))
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-3, atol=1e-5)


def test_without_the_dense_model_there_is_no_distillation(tmp_path, monkeypatch):
    seen, warnings = [], []
    monkeypatch.setattr("hap_transformers.training.trainer.logger.warning", warnings.append)
    trainer = make_trainer(tmp_path / "first")
    dense = copy.deepcopy(trainer.model)
    trainer.prune()
    config = HapConfig(distillation=0.5)
    resumed = make_trainer(tmp_path / "second", model=trainer.model, hap_config=config)
    dense.register_forward_hook(lambda *_: seen.append(1))
    resumed.train()
    assert not seen and any("Pass teacher=" in str(call) for call in warnings)
    resumed = make_trainer(tmp_path / "third", model=trainer.model, hap_config=config, teacher=dense)
    resumed.train()
    assert seen and len(warnings) == 1


def test_labels_of_another_name(tmp_path):
    """All steps give the same weights."""

    class Named(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, targets=None, **kwargs):
            return super().forward(input_ids, attention_mask=attention_mask, labels=targets, **kwargs)

    plain, ends = make_model(dtype=torch.float32), []
    for name, model in (("labels", plain), ("targets", Named(copy.deepcopy(plain.config)))):
        model.load_state_dict(make_model(dtype=torch.float32).state_dict())
        rows = Rows()
        rows.rows = [{name if k == "labels" else k: v for k, v in row.items()} for row in rows.rows]
        trainer = make_trainer(tmp_path / name, model=model, rows=rows, label_names=[name])
        trainer.eval_dataset = rows
        trainer.prune()
        trainer.train()
        ends.append((trainer.pruning_plan.heads, trainer.evaluate()["eval_accuracy"], model.state_dict()))
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(tensor, ends[1][2][name]) for name, tensor in ends[0][2].items())


def test_callbacks_and_trackers_hear_of_pruning(tmp_path):
    heard = []

    class Listening(HapCallback):
        def on_prune_begin(self, args, state, control, model, plan, **kwargs):
            heard.append(("begin", plan, sum(p.numel() for p in model.parameters())))

        def on_prune_end(self, args, state, control, model, plan, **kwargs):
            heard.append(("end", plan, sum(p.numel() for p in model.parameters())))

        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append({name: value for name, value in logs.items() if name.startswith("hap_")})

    trainer = make_trainer(tmp_path, callbacks=[Listening(), TrainerCallback()])
    dense = sum(p.numel() for p in trainer.model.parameters())
    plan = trainer.prune()
    scored, begin, logged, end = heard
    assert set(scored) == {"hap_score_seconds", "hap_score_reliability"}
    pruned = sum(p.numel() for p in trainer.model.parameters())
    assert begin == ("begin", plan, dense) and end == ("end", plan, pruned) and pruned < dense
    assert logged["hap_heads_removed"] == HEADS and logged["hap_neurons_removed"] == 0
    assert logged["hap_parameters"] == pruned and logged["hap_flops"] > 0
    history = trainer.state.log_history  # Entries also have the step.
    assert [entry for entry in history if logged.items() <= entry.items()] and "hap_score_seconds" in history[0]


def test_the_configuration_is_saved_with_the_model(tmp_path):
    config = HapConfig(ratio=0.5, budget="heads", recovery_epochs=2)
    trainer = make_trainer(tmp_path / "out", hap_config=config, watched=True)
    trainer.prune()
    trainer.save_model()
    assert HapConfig.load(tmp_path / "out" / "hap_config.json") == config
    (read,) = HfArgumentParser(HapConfig).parse_json_file(str(tmp_path / "out" / "hap_config.json"))
    assert read == config
    (tmp_path / "wrong.json").write_text('{"ratio": 2}')
    with pytest.raises(ValueError, match="wrong.json' is not a HapConfig: `ratio`"):
        HapConfig.load(tmp_path / "wrong.json")


def test_push_to_hub_uploads_the_pruned_model(tmp_path, monkeypatch):
    """The real push runs, except for the two calls that would reach the network."""
    uploads = []
    repo = RepoUrl("https://huggingface.co/me/pruned")
    # Transformers 4 calls imported functions, Transformers 5 calls methods.
    owner = transformers.trainer if TRANSFORMERS_4 else HfApi
    monkeypatch.setattr(owner, "create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr(owner, "upload_folder", lambda *args, **kwargs: uploads.append(kwargs))
    trainer = make_trainer(tmp_path)
    trainer.prune()
    trainer.push_to_hub()
    (upload,) = uploads
    assert upload["repo_id"] == "me/pruned"
    assert {"hap", "pruned"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    reloaded = AutoModelForSequenceClassification.from_pretrained(upload["folder_path"])
    assert reloaded.config.pruned_heads == trainer.model.config.pruned_heads
