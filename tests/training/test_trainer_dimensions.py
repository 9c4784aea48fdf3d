"""`HapTrainer` removes dimensions of heads: heads are aligned before, and put back if anything fails."""

import copy
import json

import pytest
import torch
from tiny import DIMENSIONS, WHOLE_HEADS, make_batch, make_model
from trainers import Rows, make_trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hap_transformers import HapConfig, PruningPlan, estimate_sensitivity
from hap_transformers.components.groups import by_kind, find_groups
from hap_transformers.data.demo import demo_model_path
from hap_transformers.planning.kinds import kinds_to_prune


CONFIG = HapConfig(ratio=0.5, max_examples=12, refit_examples=12)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**make_batch(6)).logits


def same(model, before) -> bool:
    """Whether a model has the weights of a `state_dict`, bit by bit, and no other basis."""
    found = model.state_dict()
    whole = not hasattr(model.config, "aligned_heads") and not hasattr(model.config, "quantization_config")
    return whole and found.keys() == before.keys() and all(torch.equal(before[name], found[name]) for name in before)


@pytest.mark.parametrize(
    "settings, kinds",
    [
        ({}, [*DIMENSIONS, "channels"]),
        ({"budget": "flops", "implant_ratio": 0.2}, [*DIMENSIONS, "channels"]),
        ({"budget": "latency"}, [*DIMENSIONS, "channels"]),
        ({"budget": "latency", "method": "magnitude"}, [*WHOLE_HEADS, "channels"]),
        ({"method": "gauss_newton_trace"}, [*WHOLE_HEADS, "channels"]),
        ({"min_heads": 1}, [*WHOLE_HEADS, "channels"]),
        ({"budget": "heads"}, ["heads"]),
        ({"budget": "value_dims"}, ["value_dims"]),
        ({"components": ["neurons", "value_dims"]}, ["value_dims", "neurons"]),
        ({"components": ["neurons"], "method": "fisher"}, ["neurons"]),
    ],
    ids=str,
)
def test_kinds_by_default_and_on_demand(settings, kinds):
    config = HapConfig(**settings)
    assert list(kinds_to_prune(config.components, config.method, config)) == kinds


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"components": ["columns"]}, "`components` must name some of .*value_dims"),
        ({"components": "heads"}, "`components` must name some of"),
        ({"components": []}, "`components` must name some of"),
        ({"components": ["heads", "value_dims"]}, "Value dimensions are parts of heads: remove either"),
        (
            {"components": DIMENSIONS, "method": "fisher"},
            "'fisher' cannot score query_key_dims; it scores heads, value",
        ),
        ({"components": DIMENSIONS, "method": "gradient"}, "'gradient' cannot score query_key_dims"),
        (
            {"components": DIMENSIONS[1:], "budget": "latency"},
            r"budget='latency' plans for query_key_dims and value_dims together.*or name heads in their place",
        ),
        (
            {"components": DIMENSIONS, "budget": "latency", "even_heads": False},
            "budget='latency' plans for .* leave even_heads as it is",
        ),
        ({"components": DIMENSIONS, "min_heads": 1}, "min_heads is a floor of whole heads"),
        ({"components": ["neurons"], "budget": "heads"}, "budget='heads' removes heads alone"),
    ],
    ids=str,
)
def test_kinds_that_do_not_suit_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        HapConfig(**settings)


def test_a_model_that_lost_dimensions_has_no_other_view(tmp_path):
    model = make_model(dtype=torch.float32)
    make_trainer(tmp_path, model=model, hap_config=CONFIG).prune()
    for settings in ({"components": WHOLE_HEADS}, {"budget": "heads"}):
        with pytest.raises(ValueError, match="have lost dimensions.*Name query_key_dims and value_dims in place of"):
            make_trainer(tmp_path, model=model, hap_config=HapConfig(**settings))
    with pytest.raises(ValueError, match="Measure the dense model"):
        make_trainer(tmp_path, model=model, hap_config=HapConfig(budget="latency"))
    found = estimate_sensitivity(model, [make_batch()], "magnitude", progress=False)
    assert list(found.scores) == DIMENSIONS
    again = make_trainer(tmp_path, model=model, hap_config=HapConfig(method="magnitude", ratio=0.6, refit=False))
    before = model.num_parameters()
    assert list(again.prune().original) == DIMENSIONS and model.num_parameters() < before


def test_pruned_by_steps_and_reloaded(tmp_path):
    """Every step aligns anew. A reloaded model gives the same; it has the basis on record."""
    trainer = make_trainer(tmp_path, hap_config=CONFIG)
    bases, sizes = [], []
    for ratio in (0.3, 0.6):
        trainer.hap_config.ratio = ratio
        plan = trainer.prune()
        assert plan.basis == trainer.sensitivity.basis == trainer.model.config.aligned_heads
        bases.append(plan.basis)
        sizes.append(trainer.model.num_parameters())
        trainer.train()
    assert bases[0] != bases[1] and sizes[0] > sizes[1]
    trainer.save_model()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(reloaded), logits_of(trainer.model))
    assert reloaded.config.aligned_heads == bases[1]
    assert json.loads((tmp_path / "hap_config.json").read_text())["components"] is None


def test_rotary_models_lose_pairs_on_demand(tmp_path):
    model = make_model("mistral", torch.float32, head_dim=16)
    config = HapConfig(ratio=0.5, components=DIMENSIONS, max_examples=12, refit_examples=12)
    trainer = make_trainer(tmp_path, model=model, hap_config=config)
    for ratio in (0.4, 0.6):
        trainer.hap_config.ratio = ratio
        before, plan = model.num_parameters(), trainer.prune()
        assert plan.count("query_key_dims") > 0 and before > model.num_parameters() == plan.promise["parameters"]
    marks = model.config.quantization_config["query_key_dims"]
    assert any(set(head) == {"0", "1"} for heads in marks.values() for head in heads)
    trainer.save_model()
    assert torch.equal(logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits_of(model))


def test_scoring_aligns_and_leaves_outputs_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=CONFIG)
    before, weights = logits_of(trainer.model), copy.deepcopy(trainer.model.state_dict())
    sensitivity = trainer.estimate_sensitivity()
    torch.testing.assert_close(logits_of(trainer.model), before, rtol=1e-4, atol=1e-5)
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed and all("attention" in name for name in changed)
    assert list(sensitivity.scores) == DIMENSIONS and trainer.prune(trainer.plan(sensitivity)).count("neurons")


def test_whole_heads_are_not_aligned(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, components=WHOLE_HEADS, max_examples=8))
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.estimate_sensitivity().basis == "" and same(trainer.model, before)
    assert trainer.prune().basis == "" and list(by_kind(find_groups(trainer.model)))[0].name == "heads"


@pytest.fixture(scope="module")
def pruned_at_once(tmp_path_factory):
    """The plan and the weights of a trainer that prunes without anything before."""
    trainer = make_trainer(tmp_path_factory.mktemp("at_once"), hap_config=CONFIG)
    return trainer.prune(), trainer.model.state_dict()


@pytest.mark.parametrize(
    "step, error",
    [
        *(
            (step, KeyboardInterrupt())
            for step in ("align_kinds", "estimate_sensitivity", "apply_plan", "reconstruct")
        ),
        ("plan_pruning", RuntimeError("no")),
    ],
)
def test_the_model_is_put_back_whatever_fails(tmp_path, monkeypatch, step, error, pruned_at_once):
    """Also after a step is done: most have changed the model by then. The refit puts back its own changes."""
    from hap_transformers.training import pruning

    trainer = make_trainer(tmp_path, hap_config=CONFIG)
    before, done = copy.deepcopy(trainer.model.state_dict()), getattr(pruning, step)

    def failing(*args, **kwargs):
        if step != "reconstruct":
            done(*args, **kwargs)
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(pruning, step, failing)
        with pytest.raises(type(error)):
            trainer.prune()
    assert same(trainer.model, before)
    assert trainer.prune() == pruned_at_once[0]
    for name, tensor in pruned_at_once[1].items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_scores_during_a_training_leave_its_weights(tmp_path):
    """The optimizer's moments are of the weights as they were."""
    bases = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            before = copy.deepcopy(trainer.model.state_dict())
            bases.append(trainer.estimate_sensitivity().basis)
            assert same(trainer.model, before)

    trainer = make_trainer(tmp_path, callbacks=[Watch()], hap_config=CONFIG, max_steps=3)
    trainer.train()
    assert len(set(bases)) == 3 and all(bases)
    with pytest.raises(ValueError, match=f"in the basis '{bases[-1]}', but the heads .* that they were trained in"):
        trainer.plan(trainer.sensitivity)


def test_the_basis_of_a_checkpoint_comes_with_its_weights(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=CONFIG, max_steps=2, save_steps=1, save_strategy="steps")
    trainer.train()
    stale = trainer.estimate_sensitivity()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not hasattr(trainer.model.config, "aligned_heads")
    with pytest.raises(ValueError, match="whose dimensions are others"):
        trainer.plan(stale)


def test_a_plan_of_another_basis_is_refused(tmp_path):
    model = make_model(dtype=torch.float32)
    by_hand = PruningPlan.for_model(model, value_dims={0: [0]}, neurons={0: [1]})
    heads = PruningPlan.for_model(model, heads={0: [0]}, neurons={0: [1]})
    trainer = make_trainer(tmp_path, model=model, hap_config=CONFIG)
    trainer.estimate_sensitivity()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="in the basis that they were trained in, but the heads of this Bert.* are in"
    ):
        trainer.prune(by_hand)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    by_hand.basis = model.config.aligned_heads
    by_hand.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == by_hand
    by_hand.validate(model)
    heads.validate(model)  # Whole heads are the same in any basis.
    old = json.loads((tmp_path / "plan.json").read_text())
    del old["basis"]
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert PruningPlan.load(tmp_path / "plan.json").basis == ""


def test_minilm(tmp_path):
    """A few sentences are enough to prune layers of MiniLM by dimensions, evenly over the heads of a layer."""
    sizes = {"num_labels": 2, "num_hidden_layers": 2}
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), **sizes)
    rows = Rows(8).rows
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=HapConfig(ratio=0.7, max_examples=8))
    before = logits_of(model)
    trainer.prune()
    left = [group.runs.left for group in find_groups(model, ["value_dims"])]
    widths = [set(layer) - {0} for layer in left]
    assert all(len(width) < 2 for width in widths) and 0 < sum(map(sum, left)) < 2 * 384
    assert (logits_of(model) - before).abs().max() < 1
