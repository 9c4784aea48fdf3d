from huggingface_hub import ModelCard

from hap_transformers import PruningPlan
from hap_transformers.model_card import make_model_card


RESULTS = {
    "metrics": {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8}, "recovered": {"accuracy": 0.85}},
    "parameters": {"dense": 100, "pruned": 80},
    "flops": {"dense": 1000, "pruned": 700},
    "latency_ms": {"dense": 2.0, "pruned": 1.5},
}


def test_card(tmp_path):
    plan = PruningPlan({1: [0, 3]}, "bert", [4, 4], ratio=0.25, method="hessian_trace")
    card = make_model_card(plan, base_model="tiny", task="mrpc", results=RESULTS)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert {"hap", "pruned", "hap_transformers"} <= set(loaded.data.tags)
    assert loaded.text.strip().startswith("# tiny, fine-tuned on mrpc, 2 of 8 attention heads removed")
    assert "| recovered | 0.8500 |" in loaded.text and "4, 2 (of 4, 4)" in loaded.text
