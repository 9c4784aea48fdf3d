"""Scores of decoders equal explicit derivatives of the loss of their tokens, of cross-attention, too."""

import pytest
import torch
from explicit import gauss_newton_diagonals
from seq2seq import CROSS, SELF, SEQ2SEQ
from torch.nn import functional as F

from hap_transformers import estimate_sensitivity
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.surgeon import removal_costs


def few_tokens(tiny):
    """A batch of two examples with so few classes and tokens that all directions are exact; one label does not count.

    The decoder reads as many tokens as the encoder has, so that no shape tells one's padding from the other's.
    """
    batch = tiny.batch(2)
    batch["labels"] = torch.tensor([[3, 4, 3], [4, 3, -100]])
    if "input_ids" in batch:
        batch["input_ids"] = torch.tensor([[3, 4, 0], [4, 4, 3]])
        batch["attention_mask"] = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch["decoder_input_ids"] = torch.tensor([[1, 3, 4], [1, 4, 3]])
    return batch


def of_heads(group, tensors):
    """Sums numbers for all weights of a group's projections by head."""
    rows = [tensors[p.module.weight] for p in group.writers]
    rows += [tensors[p.module.bias][:, None] for p in group.writers if p.has_bias]
    rows.append(tensors[group.reader.module.weight].T)
    return sum(part.reshape(group.num_components, -1).sum(1) for part in rows)


@pytest.mark.parametrize("family", sorted(SEQ2SEQ))
def test_traces_equal_those_of_explicit_jacobians(family):
    tiny = SEQ2SEQ[family]
    model, batch = tiny.model(vocab_size=5, attn_implementation="eager"), few_tokens(tiny)
    found = estimate_sensitivity(model, [batch], "gauss_newton_trace", components=("heads",), progress=False)
    groups = [group for group in find_groups(model, ["heads"]) if group.layer in (0, SELF[1], *CROSS)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned = {p for group in groups for projection in group.projections for p in projection.parameters}
    weights = {names[p]: p.detach() for p in owned}

    def loss(logits):
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    diagonals = gauss_newton_diagonals(model, weights, batch, loss)
    tensors = {p: diagonals[names[p]] for p in owned}
    for group in groups:
        torch.testing.assert_close(found.traces["heads"][group.layer], of_heads(group, tensors), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", sorted(SEQ2SEQ))
def test_costs_equal_those_of_explicit_factors(family):
    """A comes from the decoder's tokens whose labels count, C from the Jacobian of the logits."""
    tiny = SEQ2SEQ[family]
    model, batch = tiny.model(vocab_size=5), few_tokens(tiny)
    found = estimate_sensitivity(model, [batch], "kronecker", components=("heads", "neurons"), progress=False)
    counts = batch["labels"] != -100
    for group in find_groups(model, ["heads", "neurons"]):
        if group.layer not in (SELF[1], *CROSS):
            continue
        moment, curvature = factors(model, batch, group.reader.module, counts)
        weight = group.reader.module.weight.detach()
        size = group.reader.in_features // group.num_components
        by_input = family != "bart"
        order, costs = removal_costs(moment, weight.T @ curvature @ weight, size, by_input=by_input)
        place = group.layer
        assert torch.argsort(found.order[group.kind.name][place]).tolist() == order.tolist()
        scores = found.scores[group.kind.name][place]
        torch.testing.assert_close(scores[order], costs.cummax(0).values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("method", ["kronecker", "fisher", "gauss_newton_trace"])
def test_gradient_checkpointing_changes_nothing(family, method):
    """The graph then begins at what the encoder embeds, and at what the decoder does."""
    tiny = SEQ2SEQ[family]
    model, settings = tiny.model(), {"components": ("heads",), "progress": False}
    expected = estimate_sensitivity(model, [tiny.batch()], method, **settings).scores["heads"]
    model.gradient_checkpointing_enable()
    found = estimate_sensitivity(model, [tiny.batch()], method, **settings).scores["heads"]
    assert all(scores.min() > 0 for scores in expected)
    torch.testing.assert_close(found, expected)


def factors(model, batch, module, counts):
    """The second moment of what a projection reads, and the curvature of the mean loss in what it gives."""
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    handle.remove()
    ((inputs, outputs),) = seen
    tokens = inputs[counts].detach()
    curvature = 0
    for example, position in counts.nonzero().tolist():
        p = logits[example, position].softmax(0).detach()
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            scalar = logits[example, position] @ vector * value.sqrt()
            (g,) = torch.autograd.grad(scalar, [outputs], retain_graph=True)
            curvature = curvature + g.flatten(0, 1).T @ g.flatten(0, 1) / counts.sum()
    centred = tokens - tokens.mean(0) if module.bias is not None else tokens
    return centred.T @ centred / len(tokens), curvature
