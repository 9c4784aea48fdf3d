"""Uniform plans: every layer keeps as many components, and a checkpoint is that of an ordinary model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from decoders import DECODERS, GROUPED, Decoder
from towers import swin
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments
from zoo import ZOO

from hap_transformers import (
    HapConfig,
    HapTrainer,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
)
from hap_transformers.components.groups import find_groups
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.sensitivity.self_loss import SelfLoss
from hap_transformers.training.checks import validate_prunable


COMPONENTS = ("heads", "neurons")
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    torch.save(model(torch.arange(3, 12)[None]).logits, folder + "/logits.pt")
assert not any(name.startswith("hap_transformers") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def llama():
    """A Llama of three layers with four key/value heads, and its scores by the default method."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=40)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = {"input_ids": torch.arange(40).view(4, 10)}
    return model, estimate_sensitivity(model, [batch], loss_fn=SelfLoss(), progress=False)


def fresh(model):
    copied = LlamaForCausalLM(model.config.__class__(**model.config.to_dict())).double().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_layers_lose_their_own_cheapest(llama):
    model, sensitivity = llama
    plan = plan_pruning(sensitivity, model, ratio=0.5, uniform=True, neuron_multiple=4)
    for kind in ("heads", "neurons"):
        (count,) = {len(numbers) for numbers in plan.removed[kind].values()}
        assert 0 < count < plan.original[kind][0] and len(plan.removed[kind]) == 3
        for layer, numbers in plan.removed[kind].items():
            order = sensitivity.order[kind][layer].argsort()
            assert numbers == sorted(order[:count].tolist())
    assert 24 % 4 == 0 and all(len(n) % 4 == 0 for n in plan.neurons.values())
    removed = plan.count_parameters(model)
    dense = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    free = plan_pruning(sensitivity, model, ratio=0.5, neuron_multiple=4)
    assert removed >= 0.5 * dense and len({len(n) for n in free.neurons.values()}) > 1


def test_every_layer_keeps_something(llama):
    model, sensitivity = llama
    plan = plan_pruning(sensitivity, model, ratio=0.8, uniform=True, neuron_multiple=1)
    assert len(plan.heads[0]) <= 3 and len(plan.neurons[0]) <= 23
    with pytest.raises(ValueError, match="cannot be met: every layer keeps at least 1 heads and at least 1 neurons"):
        plan_pruning(sensitivity, model, ratio=0.99, uniform=True, neuron_multiple=1)


@pytest.mark.slow
def test_plain_transformers_loads_the_checkpoint(llama, tmp_path):
    model, ids = fresh(llama[0]), torch.arange(3, 12)[None]
    plan = plan_pruning(llama[1], model, ratio=0.5, uniform=True)
    plan.save(tmp_path / "plan.json")
    apply_plan(model, PruningPlan.load(tmp_path / "plan.json"))
    recorded = dict(model.config.quantization_config)
    model.save_pretrained(tmp_path)
    assert model.config.quantization_config == recorded and recorded["uniform"]  # In memory it knows what is gone.
    config = json.loads((tmp_path / "config.json").read_text())
    heads, neurons = (len(plan.removed[kind][0]) for kind in ("heads", "neurons"))
    assert config["num_key_value_heads"] == 4 - heads and config["num_attention_heads"] == 2 * (4 - heads)
    assert config["head_dim"] == 2 and config["intermediate_size"] == 24 - neurons
    assert "quantization_config" not in config and not config.get("pruned_heads")
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 16
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gpt2", "modernbert", "bert", "bart", "t5"])
def test_other_architectures(name, tmp_path):
    model, batch = ZOO[name].model(), ZOO[name].batch()
    groups = find_groups(model)
    own_size = name in ("mistral", "qwen2", "qwen3")  # Others derive the size of heads from their number.
    heads = {group.layer: [0] for group in groups if group.kind.name == "heads"} if own_size else {}
    neurons = {group.layer: range(4) for group in groups if group.kind.name == "neurons"}
    apply_plan(model, PruningPlan.for_model(model, heads=heads, neurons=neurons, uniform=True))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path).double()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_numbers_that_a_config_does_not_take_are_passed_over(tmp_path):
    """Transformers 5 refuses a Llama whose heads do not divide the hidden size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=40)).double().eval()
    scores = Sensitivity("random", {"heads": [torch.rand(8) for _ in range(2)]})
    plan = plan_pruning(scores, model, budget="heads", ratio=0.25, uniform=True, min_heads=1)
    left = 6 if TRANSFORMERS_4 else 4
    assert [len(numbers) for numbers in plan.removed["heads"].values()] == 2 * [8 - left]
    apply_plan(model, plan)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    again = LlamaForCausalLM.from_pretrained(tmp_path).double()
    assert again.config.num_attention_heads == left
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    if not TRANSFORMERS_4:
        whole = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=40))
        with pytest.raises(ValueError, match="their number must divide the hidden size"):
            PruningPlan.for_model(whole, heads={0: [0, 1], 1: [2, 3]}, uniform=True)


def test_the_trainer_says_so_when_it_is_made(llama, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}]
    for name in ("bert", "t5"):
        model = ZOO[name].model(torch.float32)
        with pytest.raises(ValueError, match="has no numbers for such layers alone"):
            HapTrainer(model, args, train_dataset=rows, hap_config=HapConfig(uniform=True))
        config = HapConfig(uniform=True, components=["neurons"])
        HapTrainer(model, args, train_dataset=rows, hap_config=config)
    HapTrainer(fresh(llama[0]).float(), args, train_dataset=rows, hap_config=HapConfig(uniform=True))


def test_what_no_plain_config_says(llama):
    model, sensitivity = llama
    with pytest.raises(ValueError, match=r"leaves \[3, 4, 4\] heads"):
        PruningPlan.for_model(model, heads={0: [1]}, uniform=True)
    for name in ("bert", "electra"):  # The second would be three heads of a size of five.
        with pytest.raises(ValueError, match="the size of heads follows from their number"):
            PruningPlan.for_model(ZOO[name].model(), heads={0: [1], 1: [2]}, uniform=True)
    t5 = ZOO["t5"].model()
    with pytest.raises(ValueError, match="or position biases have one a head"):
        PruningPlan.for_model(t5, heads={layer: [1] for layer in range(4)}, uniform=True)
    with pytest.raises(ValueError, match=r"leaves \[23, 23, 24\] neurons"):  # Its config has one number.
        PruningPlan.for_model(t5, neurons={0: [1], 1: [2]}, uniform=True)
    with pytest.raises(ValueError, match="set implant_ratio=0"):
        plan_pruning(sensitivity, model, uniform=True, implant_ratio=0.1)
    dims = [torch.rand(4) for _ in range(3)], [torch.rand(8) for _ in range(3)]
    scores = dict(zip(("query_key_dims", "value_dims"), dims, strict=True))
    neurons = {"neurons": [torch.rand(24) for _ in range(3)]}
    with pytest.raises(ValueError, match="uniform=True needs layers that have equally many"):
        plan_pruning(Sensitivity("random", {**scores, **neurons}), model, uniform=True, ratio=0.2)


def test_layers_of_several_sizes():
    """Swin's stages have their own widths: a plan of equal layers would not help."""
    for counts in ({0: range(8), 1: range(8), 2: range(8), 3: range(8)}, {0: range(8)}):
        with pytest.raises(ValueError, match=r"The layers have \[2, 2, 4, 4\] now, so set uniform=False"):
            PruningPlan.for_model(swin(), neurons=counts, uniform=True)
    with pytest.raises(ValueError, match="its layers add biases"):
        without_layers(swin(), 2)


def without_layers(model, *numbers):
    """A model with all heads and neurons of some layers removed by a uniform plan."""
    counts = {kind: {g.layer: range(g.num_components) for g in find_groups(model, [kind])} for kind in COMPONENTS}
    removed = {kind: {i: layers[i] for i in numbers} for kind, layers in counts.items()}
    apply_plan(model, PruningPlan.for_model(model, uniform=True, **removed))
    return model


@pytest.mark.slow
def test_plain_transformers_loads_fewer_layers(llama, tmp_path):
    model, ids = fresh(llama[0]), torch.arange(3, 12)[None]
    scores = estimate_sensitivity(model, [{"input_ids": ids}], components=["layers"], progress=False)
    plan = plan_pruning(scores, model, ratio=1 / 3, uniform=True)
    (layer,) = plan.heads
    assert scores.scores["layers"][layer] == min(scores.scores["layers"])
    apply_plan(model, plan)
    heads = {i: [0, 2] for i in range(3) if i != layer}
    apply_plan(model, PruningPlan.for_model(model, heads=heads, uniform=True))  # The others can be pruned again.
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert len(model.model.layers) == 3  # In memory it knows what is gone.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["num_key_value_heads"] == 2
    assert "quantization_config" not in config and not config.get("pruned_heads")
    folders = (tmp_path, tmp_path / "given")
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, folders)], check=True)
    for folder in folders:
        torch.testing.assert_close(torch.load(folder / "logits.pt"), model(ids).logits, rtol=1e-12, atol=1e-12)
    again = LlamaForCausalLM.from_pretrained(tmp_path).double()
    assert again.generate(ids, max_new_tokens=5).tolist() == model.generate(ids, max_new_tokens=5).tolist()
    assert [block.self_attn.layer_idx for block in again.model.layers] == [0, 1]


def test_fewer_whole_layers(tmp_path):
    """A checkpoint no longer records which heads were removed, so what was loaded can be pruned again."""
    model, batch = without_layers(ZOO["mistral"].model(), 0), ZOO["mistral"].batch()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and not config.get("pruned_heads")
    again = type(model).from_pretrained(tmp_path).double()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    apply_plan(again, PruningPlan.for_model(again, heads={0: [1]}))
    assert again.config.pruned_heads == {0: [1]} and model.config.pruned_heads == {0: [0, 1, 2, 3]}


TYPES = {"layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOWS = {**GROUPED, "use_sliding_window": True, "max_window_layers": 2}


@pytest.mark.parametrize(
    "name, gone",
    [
        ("gemma", [1, 2]),
        ("gemma2", [1, 2]),
        ("gemma3", [1, 2]),
        ("gemma3", [1, 3]),
        ("granite", [1, 2]),
        ("olmo", [1, 2]),
        ("qwen2", [1, 2]),
        ("qwen2", [2, 3]),
    ],
)
def test_fewer_layers_of_their_own_types(name, gone, tmp_path):
    """Gemma 2 and 3 and Qwen2 have layers of two types; the config says which are left, also where all are of one."""
    sizes = {"num_hidden_layers": 4, "sliding_window": 3, "attn_implementation": "eager"}
    sizes |= TYPES if name == "gemma3" else {}
    decoder = DECODERS.get(name) or Decoder("Qwen2", WINDOWS)
    model = without_layers(replace(decoder, sizes={**decoder.sizes, **sizes}).model(), *gone)
    ids = torch.arange(3, 12)[None]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    types = getattr(model.config, "layer_types", None) or [None] * 4
    assert config["num_hidden_layers"] == 2
    assert (config.get("layer_types") or [None] * 2) == [types[i] for i in range(4) if i not in gone]
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("bert", "its layers normalize the residual stream"),
        ("gpt2", "its layers add biases"),
        ("modernbert", "which depend on their places"),
        ("t5", "its encoder and its decoder have layers of their own"),
    ],
)
def test_layers_that_must_stay(name, reason):
    model = ZOO[name].model()
    with pytest.raises(ValueError, match=reason):
        without_layers(model, 0)
    assert getattr(model.config, "quantization_config", None) is None
    if name == "bert":
        config = HapConfig(components=["layers"], uniform=True)
        with pytest.raises(ValueError, match=reason):
            validate_prunable(model, config)


def test_a_trainer_loads_its_best_checkpoint_of_fewer_layers(llama, tmp_path):
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"num_train_epochs": 2, "learning_rate": 0.5, "per_device_train_batch_size": 4, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **settings)
    config = HapConfig(ratio=1 / 3, components=["layers"], uniform=True, tuning_epochs=0, distillation=0.0)
    model = fresh(llama[0]).float()
    trainer = HapTrainer(model, args, train_dataset=rows, eval_dataset=rows, hap_config=config)
    plan = trainer.prune()
    assert len(plan.heads) == 1
    trainer.train()
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert best.config.num_hidden_layers == 2 and len(model.model.layers) == 3
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(model.eval()(ids).logits, best.eval()(ids).logits, rtol=1e-5, atol=1e-5)
