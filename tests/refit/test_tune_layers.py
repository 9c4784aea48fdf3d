"""Layers of a pruned model are trained one by one towards the dense model's."""

import copy
import dataclasses

import pytest
import torch
from convnets import CONVNETS
from tiny import make_batch, make_batches, make_model, untouched
from trainers import Rows, make_trainer
from transformers import ResNetConfig, ResNetForImageClassification
from zoo import ZOO

from hap_transformers import HapConfig, PruningPlan, apply_plan, estimate_sensitivity, tune_layers
from hap_transformers.components.groups import find_groups
from hap_transformers.refit import tune_layers as module
from hap_transformers.refit.dense_copy import sharing_copy
from hap_transformers.refit.reconstruct import written


REMOVED = {"heads": {0: [0], 1: [1]}, "neurons": {0: range(8), 1: range(8)}}


def pruned_pair(model_type, count=10):
    """A pruned model, its dense model, and batches."""
    tiny = ZOO[model_type]
    dense = tiny.model(torch.float64)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # So that the layers are far from linear.
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in make_batches(tiny, count)]
    model = copy.deepcopy(dense)
    apply_plan(model, PruningPlan.for_model(model, **REMOVED))
    return model, dense, batches


def distance(model, dense, batches):
    """Relative squared distance of the last hidden states."""
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            outputs = [one.eval()(**batch, output_hidden_states=True) for one in (model, dense)]
        found, wanted = ((out.get("encoder_hidden_states") or out.hidden_states)[-1] for out in outputs)
        total += float((found - wanted).square().mean() / wanted.square().mean())
    return total


def test_it_is_adam_on_each_layer_alone():
    """The same by the layers of a BERT, called one after the other."""
    model = make_model()
    dense = copy.deepcopy(model)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(4, 30, (4, 9))} for _ in range(4)]
    apply_plan(model, PruningPlan.for_model(model, heads={1: [0]}, neurons={1: range(12)}))
    expected = copy.deepcopy(model)
    tune_layers(model, dense, batches, epochs=2, learning_rate=1e-2, progress=False)
    states = [[one.bert.embeddings(**batch).detach() for batch in batches] for one in (expected, dense)]
    states = [
        [one.bert.encoder.layer[0](hidden, None) for hidden in given]
        for one, given in zip((expected, dense), states, strict=True)
    ]
    states = [[(s[0] if isinstance(s, tuple) else s).detach() for s in given] for given in states]
    layer, original = expected.bert.encoder.layer[1].eval(), dense.bert.encoder.layer[1].eval()

    def run(one, hidden):
        output = one(hidden, None)
        return output[0] if isinstance(output, tuple) else output

    targets = [run(original, hidden).detach() for hidden in states[1]]
    trained = [p for name, p in layer.named_parameters() if "LayerNorm" not in name]
    generator, step = torch.Generator().manual_seed(0), 0
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    for _ in range(2):
        for place in torch.randperm(4, generator=generator).tolist():
            loss = (run(layer, states[0][place]) - targets[place]).square().mean() / targets[place].square().mean()
            rate = 1e-2 * min((step + 1) / 20, 1) * (1 - step / 8)
            step += 1
            for p, g, (m, v) in zip(trained, torch.autograd.grad(loss, trained), moments, strict=True):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p.data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.named_parameters())[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model_type", sorted(set(ZOO) - {"albert", "whisper"}))
def test_layers_come_nearer_to_the_dense_ones(model_type):
    model, dense, batches = pruned_pair(model_type, count=4)  # Too few to hold one out.
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(dense.state_dict())
    start = distance(model, dense, batches)
    tune_layers(model, dense, batches, epochs=6, learning_rate=1e-2, progress=False)
    assert distance(model, dense, batches) < 0.95 * start
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dense.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any("norm" in name.lower() or "embed" in name for name in changed)


def test_a_layer_that_gets_worse_on_batches_held_out_rests():
    model, dense, batches = pruned_pair("bert")
    before = copy.deepcopy(model.state_dict())
    tune_layers(model, dense, batches, epochs=1, learning_rate=1e6, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dense_model_that_shares_weights_gets_its_own():
    model = make_model()
    dense, before = sharing_copy(model), copy.deepcopy(model.state_dict())
    batches = [make_batch(seed=seed) for seed in range(3)]
    apply_plan(model, PruningPlan.for_model(model, neurons={0: range(8)}))
    tune_layers(model, dense, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("place", [2, 9])  # Trained on, held out.
def test_batches_in_which_nothing_counts(place):
    model, dense, batches = pruned_pair("bert")
    batches[place]["attention_mask"] = torch.zeros_like(batches[place]["attention_mask"])
    before = distance(model, dense, [batch for i, batch in enumerate(batches) if i != place])
    tune_layers(model, dense, batches, progress=False)
    assert distance(model, dense, [batch for i, batch in enumerate(batches) if i != place]) < before


def test_images_of_which_nothing_is_left():
    """The dense model's layers give zeros."""
    net = CONVNETS["resnet-basic"]
    dense = net.model()
    for norm in dense.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(norm.bias)
            torch.nn.init.zeros_(norm.running_mean)
    model = copy.deepcopy(dense)
    apply_plan(model, PruningPlan.for_model(model, channels={0: [1, 2]}))
    batches = [net.batch(seed=seed) for seed in range(10)]
    batches[3] = {"pixel_values": torch.zeros_like(batches[3]["pixel_values"])}
    before = distance(model, dense, batches[:3])
    tune_layers(model, dense, batches, progress=False)
    assert distance(model, dense, batches[:3]) < before


def test_what_cannot_be_tuned_is_named(monkeypatch):
    model, dense, batches = pruned_pair("bert", count=2)
    for changes, words in (({"epochs": 0}, "must be positive, got 0"), ({"learning_rate": 0.0}, "must be positive")):
        with pytest.raises(ValueError, match=words):
            tune_layers(model, dense, batches, **changes)
    with pytest.raises(ValueError, match="There are no batches"):
        tune_layers(model, dense, [])
    albert = ZOO["albert"].model(torch.float64)
    with pytest.raises(ValueError, match="AlbertForSequenceClassification share their weights"):
        tune_layers(albert, copy.deepcopy(albert), batches)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model, dense, batches = pruned_pair("bert", count=3)
    before, train, calls = copy.deepcopy(model.state_dict()), module.train_layer, []

    def interrupted(*given):
        train(*given)
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_layers(model, dense, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_in_half_precision_are_trained_in_float32():
    """Steps of 1e-4 are lost on most weights in bfloat16. What is trained is rounded once, at the end."""
    exact = make_model(dtype=torch.float32, num_hidden_layers=1)
    exact.bfloat16().float()
    model, dense = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    exact_dense, batches = copy.deepcopy(exact), [make_batch(seed=seed) for seed in range(3)]
    for one in (model, exact):
        apply_plan(one, PruningPlan.for_model(one, heads={0: [0]}, neurons={0: range(12)}))
    tune_layers(model, dense, batches, epochs=4, learning_rate=1e-4, progress=False)
    before = copy.deepcopy(exact.state_dict())
    tune_layers(exact, exact_dense, batches, epochs=4, learning_rate=1e-4, progress=False)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        moved = (exact.state_dict()[name] - before[name]).norm()
        if moved:  # Rounding takes little of the way away.
            assert (tensor.float() - exact.state_dict()[name].bfloat16().float()).norm() < moved, name
    assert distance(model, dense, batches) < distance(before_tuning(exact, before), exact_dense, batches)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """Embeddings require gradients there, and so do the outputs of layers that are not trained."""
    model, dense, batches = pruned_pair("bert")
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    checkpointed.train()
    for one in (model, checkpointed):
        tune_layers(one, dense, batches, epochs=2, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpointed.state_dict()[name])


def test_gradients_that_are_switched_off_are_switched_on():
    model, dense, batches = pruned_pair("bert", count=3)
    start = distance(model, dense, batches)
    with torch.no_grad():
        tune_layers(model, dense, batches, epochs=6, learning_rate=1e-2, progress=False)
    assert distance(model, dense, batches) < start


def test_gradients_that_are_excluded_are_named():
    model, dense, batches = pruned_pair("bert", count=3)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode\(\) excludes"):
        tune_layers(model, dense, batches, progress=False)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode\(\) excludes"):
        estimate_sensitivity(dense, batches, progress=False)


def test_outputs_that_are_not_finite_are_named():
    model, dense, batches = pruned_pair("bert", count=3)
    with torch.no_grad():
        dense.get_submodule("bert.encoder.layer.1.output.dense").bias[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"output of layer \d of Bert\w+ is nan away from the dense model's.*tuning_epochs=0"
    ):
        tune_layers(model, dense, batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def before_tuning(model, state):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("model_type", "refit", "said", "expected"),
    [("bert", True, None, 3), ("bert", True, 0, 0), ("bert", False, None, 0), ("albert", True, None, 0)],
)
def test_layers_are_tuned_by_default_where_they_can_be(tmp_path, monkeypatch, model_type, refit, said, expected):
    epochs = []
    monkeypatch.setattr(
        "hap_transformers.training.pruning.tune_layers", lambda *args, **kwargs: epochs.append(kwargs["epochs"])
    )
    components = ["heads", "neurons"]
    config = HapConfig(ratio=0.5, max_examples=4, refit=refit, tuning_epochs=said, components=components)
    trainer = make_trainer(tmp_path, model=ZOO[model_type].model(torch.float32), hap_config=config)
    trainer.prune()
    assert epochs == [expected] * bool(expected)


def test_the_trainer_tunes_after_the_refit(tmp_path):
    """As the functions do."""
    config = HapConfig(ratio=0.5, max_examples=12, refit_examples=12, tuning_epochs=2, distillation=0.0)
    trainer = make_trainer(tmp_path, hap_config=config, seed=3)
    plain = make_trainer(tmp_path, hap_config=dataclasses.replace(config, tuning_epochs=0), seed=3)
    tuned, refitted = trainer.prune(), plain.prune()
    assert tuned == refitted
    dense = make_model(dtype=torch.float32)
    rows, order = Rows().rows, torch.randperm(24, generator=torch.Generator().manual_seed(3))[:12]
    batches = [{k: torch.stack([rows[i][k] for i in order[j : j + 4]]) for k in rows[0]} for j in (0, 4, 8)]
    tune_layers(plain.model, dense, batches, epochs=2, progress=False)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, dict(plain.model.named_parameters())[name], rtol=1e-4, atol=1e-5)


def test_the_trainer_names_what_cannot_be_tuned_when_it_is_made(tmp_path):
    config = HapConfig(tuning_epochs=2)
    with pytest.raises(ValueError, match="Layers of AlbertForSequenceClassification share their weights"):
        make_trainer(tmp_path, model=ZOO["albert"].model(torch.float32), hap_config=config)
    for wrong in (1.5, True, "3"):
        with pytest.raises(ValueError, match="`tuning_epochs` must be a whole number"):
            HapConfig(tuning_epochs=wrong)
    for wrong in ({"tuning_epochs": -1}, {"tuning_epochs": 1, "refit": False}):
        with pytest.raises(ValueError, match="`tuning_epochs` must not be negative and needs refit=True"):
            HapConfig(**wrong)


def images():
    """A network whose BatchNorm has statistics of its images, and the images."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    model, pixels = ResNetForImageClassification(config), torch.randn(24, 3, 16, 16)
    model.train()(pixel_values=pixels)
    return {"model": model, "rows": [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]}


@pytest.mark.parametrize("arguments, kinds", [(dict, ["heads", "neurons"]), (images, ["channels"])])
def test_a_failure_in_tuning_undoes_the_refit_in_the_trainer(tmp_path, monkeypatch, arguments, kinds):
    """The refit has also written into weights and statistics that pruning did not replace."""
    config = HapConfig(ratio=0.3, max_examples=12, tuning_epochs=1, components=kinds)
    trainer = make_trainer(tmp_path, hap_config=config, **arguments())
    before = copy.deepcopy(trainer.model.state_dict())

    def fail(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr("hap_transformers.training.pruning.tune_layers", fail)
    with pytest.raises(RuntimeError, match="no room"):
        trainer.prune()
    assert untouched(trainer.model, before)


@pytest.mark.parametrize("model_type", ["gpt2", "modernbert", "bert"])
def test_a_weight_that_projections_share_is_trained_once(model_type):
    """Adam takes a step for every mention of a parameter."""
    model = pruned_pair(model_type)[0]
    for groups in (find_groups(model), find_groups(model, ["query_key_dims", "value_dims", "neurons"])):
        found = written([group for group in groups if group.readers])
        assert len(found) == len({id(weight) for weight in found}) > 0
