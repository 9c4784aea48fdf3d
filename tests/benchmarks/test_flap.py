"""FLAP's score against its definition in float64."""

import pytest
import torch
from zoo import HEADS, LAYERS, NEURONS, ZOO

from benchmarks.flap import FLAP
from hap_transformers import METHODS, estimate_sensitivity, plan_pruning


pytestmark = pytest.mark.any_release


def test_scores_are_those_of_the_paper(monkeypatch):
    monkeypatch.setitem(METHODS, "flap", FLAP)
    tiny = ZOO["mistral"]
    model, batches = tiny.model(), [tiny.batch(3), tiny.batch(2)]
    names = {"heads": (tiny.heads_out, HEADS), "neurons": (tiny.neurons_out, NEURONS)}
    found = estimate_sensitivity(model, batches, "flap", progress=False)
    for kind, (path, count) in names.items():
        for layer in range(LAYERS):
            module, seen = model.get_submodule(f"{tiny.layer.format(layer)}.{path}"), []
            handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            for batch in batches:
                with torch.no_grad():
                    model(**batch)
            handle.remove()
            tokens = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)])
            each = tokens.var(0, correction=0) * module.weight.detach().square().sum(0)
            wanted = each.view(count, -1).sum(1)
            wanted = (wanted - wanted.mean()) / wanted.std()
            torch.testing.assert_close(getattr(found, kind)[layer].double(), wanted, rtol=1e-4, atol=1e-5)
    plan = plan_pruning(found, model, ratio=0.3)
    gone = [numbers for layers in plan.removed.values() for numbers in layers.values()]
    assert sum(map(len, gone)) > 5
