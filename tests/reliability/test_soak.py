"""Many rounds leave nothing behind."""

import gc
import os

import psutil
import torch
from tiny import LONG, make_batch, make_model
from transformers import AutoModelForSequenceClassification

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity, reconstruct
from hap_transformers.components.groups import find_groups


ROUNDS = 200 if LONG else 30
# Caches of torch and Transformers are filled by then.
SETTLED = ROUNDS // 3
HEADS = 16


def test_score_prune_refit_save_reload_again_and_again(tmp_path, tell):
    """Memory, files, open files, hooks and modules do not grow. Each round removes one head."""
    process, folder = psutil.Process(), tmp_path / "model"
    memory, handles, hooks, objects, model = [], [], [], [], None
    batch = make_batch(8)
    for number in range(ROUNDS):
        if number % HEADS == 0:  # Only the last head is left.
            model = make_model(dtype=torch.float32, num_attention_heads=HEADS // 2)
        found = estimate_sensitivity(model, [batch], components=["heads"], progress=False)
        # The layer's order of removal starts at its lowest score.
        layer = min((layer for layer in (0, 1) if len(found.heads[layer])), key=lambda i: float(found.heads[i].min()))
        group = find_groups(model, ["heads"])[layer]
        head = group.kept[int(found.heads[layer].argmin())]
        dense = AutoModelForSequenceClassification.from_pretrained(folder) if number % HEADS else model
        if number % HEADS == 0:
            model.save_pretrained(folder)
            dense = AutoModelForSequenceClassification.from_pretrained(folder)
        apply_plan(model, PruningPlan.for_model(model, heads={layer: [head]}))
        reconstruct(model, dense, [batch], progress=False)
        model.save_pretrained(folder)
        reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reloaded.parameters(), strict=True))
        left = sum(group.num_components for group in find_groups(reloaded, ["heads"]))
        assert left == HEADS - 1 - number % HEADS
        model = reloaded
        del dense, reloaded, group
        gc.collect()
        memory.append(process.memory_info().rss)
        handles.append(process.num_fds())
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
        objects.append(sum(isinstance(o, torch.Tensor | torch.nn.Module) for o in gc.get_objects()))
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert set(hooks) == {0} and len(set(handles[SETTLED:])) == 1
    same_round = range(SETTLED, ROUNDS - HEADS)
    assert all(objects[i] == objects[i + HEADS] for i in same_round)
    assert max(memory[SETTLED:]) - memory[SETTLED] < 8 * 2**20  # The model itself has 25 kB.
    tell(rounds=ROUNDS, grown=round((memory[-1] - memory[SETTLED]) / 2**20, 1))
