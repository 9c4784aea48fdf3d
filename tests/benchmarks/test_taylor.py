"""Taylor importance against the released package's, and against its definition where that finds no components."""

import pytest
import torch
import torch_pruning
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.taylor import taylor


pytestmark = pytest.mark.any_release
LAYERS, SIZE, HEADS = 2, 8, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": HEADS}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=50, use_cache=False)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches():
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(50, (2, 3, 6))]


@pytest.fixture(scope="module")
def scores(model, batches):
    return taylor(model, batches, ["heads", "neurons"]).scores


def backward(model, batches):
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()


def test_neurons_have_the_importance_of_the_released_package(model, batches, scores):
    backward(model, batches)
    graph = torch_pruning.DependencyGraph()
    example = {"input_ids": batches[0]["input_ids"]}
    graph.build_dependency(model, example, output_transform=lambda outputs: outputs.logits)
    for layer, found in zip(model.model.layers, scores["neurons"], strict=True):
        projection = layer.mlp.gate_proj
        coupled = graph.get_pruning_group(projection, torch_pruning.prune_linear_out_channels, list(range(24)))
        wanted = torch_pruning.importance.GroupTaylorImportance()(coupled)
        torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)


def test_heads_have_the_importance_of_all_their_weights(model, batches, scores):
    backward(model, batches)
    for layer, found in zip(model.model.layers, scores["heads"], strict=True):
        attention, wanted = layer.self_attn, torch.zeros(HEADS).double()
        projections = {name: getattr(attention, f"{name}_proj").weight for name in "qkvo"}
        for head in range(HEADS):
            queries, keys = slice(2 * head * SIZE, 2 * (head + 1) * SIZE), slice(head * SIZE, (head + 1) * SIZE)
            for name, rows in {"q": queries, "k": keys, "v": keys}.items():
                wanted[head] += (projections[name] * projections[name].grad)[rows].abs().double().sum()
            wanted[head] += (projections["o"] * projections["o"].grad)[:, queries].abs().double().sum()
        torch.testing.assert_close(found, wanted.detach() / wanted.mean().detach())


def test_gradients_are_left_at_none(model, batches):
    taylor(model, batches, ["neurons"])
    assert all(parameter.grad is None for parameter in model.parameters())
