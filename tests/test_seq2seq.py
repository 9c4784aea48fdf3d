"""Encoder-decoders from scores to a checkpoint: one budget for the encoder, the decoder and its cross-attention."""

import copy

import pytest
import torch
from seq2seq import CROSS, SELF, SEQ2SEQ
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, GenerationMixin

from hap_transformers import METHODS, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.components.groups import find_groups


@pytest.fixture(params=sorted(SEQ2SEQ))
def tiny(request):
    return SEQ2SEQ[request.param]


def sensitivity_of(model, tiny, method="kronecker", components=("heads", "neurons")):
    batches = [tiny.batch(4, dtype=model.dtype, seed=seed) for seed in range(2)]
    settings = {"components": components, "progress": False, "num_probes": 2}
    return estimate_sensitivity(model, batches, method, **settings)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_scores_all_groups(tiny, method):
    model = tiny.model(attn_implementation="eager")
    kinds = ("heads",) if method == "fisher" else ("heads", "neurons")
    found = sensitivity_of(model, tiny, method, kinds)
    for kind in kinds:
        counts = [group.num_components for group in find_groups(model, [kind])]
        assert [len(scores) for scores in found.scores[kind]] == counts
        assert all(scores.abs().sum() > 0 for scores in found.scores[kind])


@pytest.mark.parametrize("kinds", [("heads", "neurons"), ("query_key_dims", "value_dims", "neurons")], ids=len)
def test_the_whole_road(tiny, kinds, tmp_path):
    dense, dtype = tiny.model(torch.float32), torch.float32
    model = copy.deepcopy(dense)
    batches = [tiny.batch(8, dtype=dtype, seed=seed) for seed in range(3)]
    scores = sensitivity_of(model, tiny, components=kinds)
    plan = plan_pruning(scores, model, ratio=0.5, neuron_multiple=4)
    assert {layer for layers in plan.removed.values() for layer in layers} & {*SELF, *CROSS}
    apply_plan(model, plan)

    def error():
        with torch.no_grad():
            return sum((model(**b).logits - dense(**b).logits)[b["labels"] != -100].square().sum() for b in batches)

    before = error()
    reconstruct(model, dense, batches, progress=False)
    assert error() < 0.7 * before
    model.save_pretrained(tmp_path)
    auto = AutoModelForSpeechSeq2Seq if tiny.audio else AutoModelForSeq2SeqLM
    again = copy.deepcopy(auto.from_pretrained(tmp_path, torch_dtype=dtype).eval())
    assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    found, wanted = (GenerationMixin.generate(each, **inputs, **settings) for each in (again, model))
    assert torch.equal(found, wanted)
    # Pruned again.
    apply_plan(again, plan_pruning(sensitivity_of(again, tiny, components=kinds), again, ratio=0.7, neuron_multiple=4))
    assert again(**batches[0]).logits.isfinite().all()
