"""A layer as wide as in the smallest published model of every architecture is scored, pruned and refitted in time."""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import transformers
from tiny import ROOT
from zoo import VOCABULARY, ZOO

from hap_transformers import apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_encoder_parameters


# Hidden size, heads, neurons and what else is wide. RoBERTa stands for CamemBERT and XLM-RoBERTa, ViT for DeiT.
WIDTHS = {
    "albert": (768, 12, 3072, {"embedding_size": 128, "num_hidden_groups": 1}),  # ALBERT base
    "bart": (768, 12, 3072, {"decoder_attention_heads": 12, "decoder_ffn_dim": 3072}),  # BART base
    "beit": (384, 6, 1536, {}),
    "bert": (384, 12, 1536, {}),  # MiniLM
    "clip": (768, 12, 3072, {}),  # CLIP base, the tower of images
    "deberta-v2": (384, 6, 1536, {}),
    "deberta-v3": (384, 6, 1536, {}),  # DeBERTa v3 xsmall
    "distilbert": (768, 12, 3072, {}),
    "electra": (256, 4, 1024, {"embedding_size": 128}),  # ELECTRA small
    "dinov2": (384, 6, 4, {"use_swiglu_ffn": False}),  # DINOv2 small
    "gpt2": (768, 12, 3072, {}),
    "llama": (576, 9, 1536, {"num_key_value_heads": 3, "head_dim": 64}),  # SmolLM2 135M
    "mistral": (1024, 8, 3584, {"num_key_value_heads": 2, "head_dim": 128}),
    "modernbert": (768, 12, 1152, {}),  # ModernBERT base
    "mpnet": (768, 12, 3072, {}),
    "opt": (768, 12, 3072, {"word_embed_proj_dim": 768}),  # OPT 125M
    "qwen2": (896, 14, 4864, {"num_key_value_heads": 2, "head_dim": 64}),  # Qwen2 0.5B
    "qwen3": (1024, 16, 3072, {"num_key_value_heads": 8, "head_dim": 128}),  # Qwen3 0.6B
    "roberta": (768, 12, 3072, {}),
    "siglip": (768, 12, 3072, {}),
    "swin": (96, [3, 6], 4.0, {"depths": [1, 1]}),  # Two stages of Swin tiny
    "t5": (512, 8, 2048, {"d_kv": 64}),  # T5 small
    "t5-gated": (512, 6, 1024, {"d_kv": 64}),  # Flan-T5 small
    "vit": (192, 3, 768, {}),  # ViT tiny
    "whisper": (384, 6, 1536, {}),  # Whisper tiny
}
# Name, components, ratio. Rotary pairs go by themselves: on so few tokens, a refit replaces any neuron.
CASES = {name: (name, None, 0.5) for name in WIDTHS}
CASES |= {f"pairs of {name}": (name, ["query_key_dims"], 0.05) for name in ("llama", "modernbert")}
SECONDS = 1200  # For all of them on busy cores. Two free ones take less than two minutes.


def make_model(name):
    hidden, heads, neurons, more = WIDTHS[name]
    tiny = ZOO[name]
    sizes = {**dict(zip(tiny.names, (hidden, heads, 1, neurons), strict=True)), **more}
    torch.manual_seed(0)
    return getattr(transformers, tiny.family + tiny.task)(tiny.config(**sizes)).eval()


def make_batch(name, model):
    """Eight short texts, images or spectrograms, with labels."""
    generator = torch.Generator().manual_seed(0)
    batch = ZOO[name].batch(8, torch.float32)
    if "input_ids" in batch:
        ids = torch.randint(3, VOCABULARY, (8, 16), generator=generator)
        ids[:, -1] = 2
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        shape = model(**batch).logits.shape[:-1]
    return batch, {**batch, "labels": torch.randint(0, 2, shape, generator=generator)}


def prune(name, components, ratio):
    """Scores, prunes and refits a model; returns what is asserted about it, and the seconds it took."""
    dense, start = make_model(name), time.perf_counter()
    whole = count_encoder_parameters(dense)
    batch, labelled = make_batch(name, dense)
    scores = estimate_sensitivity(dense, [labelled], components=components, progress=False)
    plan = plan_pruning(scores, dense, ratio=ratio)
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, plan)
    logits = {}
    with torch.no_grad():
        logits["dense"], logits["pruned"] = dense(**batch).logits, smaller(**batch).logits
        reconstruct(smaller, dense, [batch], progress=False)
        logits["refitted"] = smaller(**batch).logits
    return {
        "finite": all(bool(values.isfinite().all()) for values in logits.values()),
        "distances": [float((logits[which] - logits["dense"]).norm()) for which in ("pruned", "refitted")],
        "left": count_encoder_parameters(smaller) / whole,
        "step": max(group.parameters_per_component() for group in find_groups(dense)) / whole,
        "seconds": time.perf_counter() - start,
    }


def in_this_process(file):
    torch.set_num_threads(2)
    for case, (name, components, ratio) in CASES.items():
        with open(file, "a") as results:
            results.write(json.dumps({case: prune(name, components, ratio)}) + "\n")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a second process with two threads finds until its time is up."""
    file = tmp_path_factory.mktemp("widths") / "results"
    paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": paths}
    try:
        subprocess.run([sys.executable, __file__, str(file)], check=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        pass  # The tests of the models that were not reached say which one it hung at.
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {name: result for entry in found for name, result in entry.items()}


@pytest.mark.parametrize("case", CASES)
def test_scored_pruned_and_refitted(results, case):
    assert case in results, f"ended at {list(results)[-1:]}"
    result, whole = results[case], 1 - CASES[case][2]
    without, refitted = result["distances"]
    assert result["finite"] and 0 < refitted < 0.8 * without
    assert whole - max(result["step"], 0.01) < result["left"] <= whole  # The last to go may be a head, or 16 neurons.


if __name__ == "__main__":
    in_this_process(sys.argv[1])
