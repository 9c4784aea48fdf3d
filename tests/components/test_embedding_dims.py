"""Word embeddings of lower rank: the module, its checkpoints, exports, what is refused, and trimming beside it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny import make_batches
from transformers import AutoModelForSequenceClassification
from vocabularies import SEEN, TOKENIZERS, model_for
from zoo import ZOO, logits

from hap_transformers import (
    PruningPlan,
    align_embeddings,
    apply_plan,
    export_remote_code,
    prune_heads,
    trim_vocabulary,
)
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_parameters


SEPARATE = ["albert", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "modernbert", "mpnet", "roberta"]
GONE = [1, 4, 6]


def narrow(model_type="bert", dtype=torch.float32, gone=GONE, **sizes):
    """A model whose embeddings have lost dimensions, and its dense self."""
    tiny = ZOO[model_type]
    dense = tiny.model(dtype, use_cache=False, **sizes)
    model = copy.deepcopy(dense)
    align_embeddings(model, make_batches(tiny, 2), progress=False)
    aligned = copy.deepcopy(model)
    apply_plan(model, PruningPlan.for_model(model, embedding_dims={0: gone}))
    return model, aligned


@pytest.fixture(scope="module")
def bert():
    return narrow()


def zeroed(aligned, gone=GONE):
    """The aligned model with zeros in some dimensions."""
    copied = copy.deepcopy(aligned)
    copied.get_input_embeddings().weight.data[:, gone] = 0
    return copied


@pytest.mark.parametrize("model_type", SEPARATE)
def test_is_the_aligned_model_without_these_dimensions(tmp_path, model_type):
    model, aligned = narrow(model_type)
    tiny = ZOO[model_type]
    torch.testing.assert_close(logits(model, tiny), logits(zeroed(aligned), tiny))
    table = model.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding) and table.padding_idx == aligned.get_input_embeddings().padding_idx
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    assert again.config.quantization_config == model.config.quantization_config


def test_is_pickled_copied_and_pruned_further(bert, tmp_path):
    tiny, model = ZOO["bert"], copy.deepcopy(bert[0])
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tiny), logits(model, tiny))
    prune_heads(model, {0: [1]})
    apply_plan(model, PruningPlan.for_model(model, embedding_dims={0: [0, 2]}, neurons={1: [3]}))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    (group,) = find_groups(again, ["embedding_dims"])
    assert group.num_components == 16 - len(GONE) - 2 and again.config.pruned_heads == {0: [1]}
    expected = zeroed(bert[1], [*GONE, 0, 3])  # Those that were left were numbered anew.
    prune_heads(expected, {0: [1]})
    apply_plan(expected, PruningPlan.for_model(expected, neurons={1: [3]}))
    torch.testing.assert_close(logits(again, tiny), logits(expected, tiny))


def test_loads_by_exported_code(bert, tmp_path):
    tiny, model = ZOO["bert"], bert[0]
    model.save_pretrained(tmp_path)
    export_remote_code(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    with pytest.raises(ValueError, match="of rank 13, and resize_token_embeddings would put plain ones"):
        again.resize_token_embeddings(50)


def test_cannot_be_resized(bert):
    model, aligned = bert
    for each in (model, aligned):
        before = logits(each, ZOO["bert"])
        with pytest.raises(ValueError, match="Resize the dense model, and prune it then"):
            each.resize_token_embeddings(50)
        assert torch.equal(logits(each, ZOO["bert"]), before)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    dense = ZOO["bert"].model(torch.float32)
    assert dense.resize_token_embeddings(50).num_embeddings == 50


def test_a_plan_for_others_joins_what_was_aligned_alone(bert):
    model = copy.deepcopy(bert[1])
    apply_plan(model, PruningPlan.for_model(model, neurons={0: [1]}))
    table = model.get_input_embeddings()
    assert type(table) is torch.nn.Embedding and not list(table.children())
    expected = ZOO["bert"].model(torch.float32)
    torch.testing.assert_close(table.weight, expected.get_input_embeddings().weight)
    assert not model.config.quantization_config["embedding_dims"]
    kinds = {group.kind.name for group in find_groups(model)}
    assert "embedding_dims" not in kinds
    untouched = copy.deepcopy(bert[1])
    apply_plan(untouched, PruningPlan.for_model(untouched))
    assert not hasattr(untouched.config, "quantization_config")


@pytest.mark.parametrize("count, match", [(17, "16"), (-1, "-1"), ("8", "'8'")])
def test_records_of_other_sizes_are_refused(bert, tmp_path, count, match):
    model = copy.deepcopy(bert[0])
    model.config.quantization_config["embedding_dims"] = {"0": count}
    torch.save(model.state_dict(), tmp_path / "unused")
    model.config.save_pretrained(tmp_path)
    bert[0].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=f"gives layer 0 .*{match}"):
        type(model).from_pretrained(tmp_path / "model")


@pytest.mark.any_release
def test_is_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = narrow(num_hidden_layers=1)[0], ZOO["bert"].batch(dtype=torch.float32)
    program = torch.export.export(model, (), kwargs=batch, strict=False)
    torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits)
    torch.onnx.export(model, (), kwargs=batch, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = session.run(None, {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()})
    np.testing.assert_allclose(outputs[0], model(**batch).logits.detach().numpy(), rtol=0, atol=1e-4)


def test_trained(bert):
    """Gradients reach the table and its map; padding gets none."""
    model, batch = copy.deepcopy(bert[0]).train(), ZOO["bert"].batch()
    table = model.get_input_embeddings()
    batch["input_ids"][:, -1] = table.padding_idx
    model(**batch).logits.square().sum().backward()
    assert table.weight.grad.abs().sum() > 0 and table.map.weight.grad.abs().sum() > 0
    assert not table.weight.grad[table.padding_idx].any()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_the_vocabulary_is_trimmed(tmp_path, before):
    tokenizer = TOKENIZERS["WordPiece"]()
    model = model_for(tokenizer, task="ForSequenceClassification").eval()
    inputs = tokenizer(SEEN, padding=True, return_tensors="pt", return_token_type_ids=False)

    def prune():
        batches = [tokenizer(SEEN, padding=True, return_tensors="pt", return_token_type_ids=False)]
        align_embeddings(model, batches, progress=False)
        apply_plan(model, PruningPlan.for_model(model, embedding_dims={0: range(8, 16)}))

    if not before:
        prune()
        expected = model(**inputs).logits
    plan = trim_vocabulary(model, tokenizer, SEEN)
    if before:
        prune()
    inputs = tokenizer(SEEN, padding=True, return_tensors="pt", return_token_type_ids=False)
    if not before:
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert count_parameters(model) == plan.parameters["after"]
    assert model.get_input_embeddings().weight.shape == (len(plan.kept), 8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
