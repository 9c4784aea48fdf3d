import pytest
import torch
from tiny import make_batch, make_model
from transformers import T5ForConditionalGeneration
from zoo import HIDDEN, ZOO

from hap_transformers.efficiency import compare_latency, count_flops, count_parameters, example_inputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_head_by_hand(attention):
    model, batch = make_model(dtype=torch.float32, attn_implementation=attention), make_batch(size=3, length=7)
    dense = count_flops(model, batch)
    model.prune_heads({0: [2]})
    tokens, head_dim = 3 * 7, 4
    projections = 4 * 2 * tokens * HIDDEN * head_dim
    scores_and_context = 2 * 2 * tokens * 7 * head_dim
    assert dense - count_flops(model, batch) == projections + scores_and_context


@pytest.mark.parametrize("model_type", ["bart", "deberta-v2"])
def test_gradient_checkpointing_changes_no_flops(model_type):
    tiny = ZOO[model_type]
    model, batch = tiny.model(torch.float32), tiny.batch(dtype=torch.float32)
    expected = count_flops(model, batch)
    model.gradient_checkpointing_enable()
    hooks = len(model.get_input_embeddings()._forward_hooks)
    assert count_flops(model, batch) == expected
    assert len(model.get_input_embeddings()._forward_hooks) == hooks


def test_shared_parameters_count_once():
    model = make_model()
    before = count_parameters(model)
    model.classifier.weight = torch.nn.Parameter(torch.zeros(2, HIDDEN))
    model.tied = model.classifier
    assert count_parameters(model) == before


def test_measuring_leaves_the_mode_alone():
    model, batch = make_model(dtype=torch.float32).train(), make_batch()
    model.classifier.eval()
    count_flops(model, batch)
    seconds = compare_latency({"model": model}, batch, repeats=1)
    assert seconds["model"] > 0
    assert model.training and not model.classifier.training


@pytest.mark.parametrize("model_type", ZOO)
def test_every_architecture_takes_the_example_inputs(model_type):
    model = ZOO[model_type].model(torch.float32, eos_token_id=2)  # GPT-2's default is outside a tiny vocabulary.
    with torch.no_grad():
        logits = model(**example_inputs(model, batch=2, length=5))[0]
    assert logits.shape[0] == 2 and torch.isfinite(logits).all()


def test_example_inputs_of_a_decoder_and_of_several_ends():
    tiny = ZOO["t5"]
    model = T5ForConditionalGeneration(tiny.config())
    assert model(**example_inputs(model, 2, 5)).logits.shape[:2] == (2, 5)
    model = ZOO["llama"].model(torch.float32)
    model.config.eos_token_id = [7, 8]
    assert example_inputs(model, 1, 5)["input_ids"][0].tolist() == [5, 5, 5, 5, 7]


def test_positions_that_begin_behind_that_of_padding():
    model = make_model("roberta", dtype=torch.float32)
    most = model.config.max_position_embeddings - model.config.pad_token_id - 1
    assert torch.isfinite(model(**example_inputs(model, 1, most)).logits).all()
    with pytest.raises(ValueError, match=f"takes at most {most} tokens, not {most + 1}"):
        example_inputs(model, 1, most + 1)
