"""Towers of images or texts, stages of different widths, windows, and forms of position biases and gates."""

import pytest
import torch
import transformers
from image_files import pixels_of
from PIL import Image
from tiny import make_batches
from towers import TOWERS, dinov2, first_output, images, swin
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from zoo import HEADS, NEURONS, ZOO, masked

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity, plan_pruning, prune_heads, reconstruct
from hap_transformers.components.groups import find_groups
from hap_transformers.components.releases import DINOV2_RENAMED, IMAGE_PROCESSOR


FIRST = {"heads": {0: [1], 1: [0, 3]}, "neurons": {0: [0, 5], 1: range(NEURONS)}}
SECOND = {"heads": {0: [1, 2], 1: range(HEADS)}, "neurons": {0: [2]}}


@pytest.mark.parametrize("name", TOWERS)
def test_removed_is_masked_and_reloads(name, tmp_path):
    tiny = TOWERS[name]
    # Transformers 4 cannot make a causal mask in float64.
    dtype, tolerance = (torch.float32, 1e-4) if name == "clip_text_model" else (torch.float64, 1e-10)
    model = tiny.model(dtype)
    expected = first_output(masked(model, tiny, FIRST["heads"], FIRST["neurons"]), tiny)
    both = masked(model, tiny, {0: [1, 2], 1: range(HEADS)}, {0: [0, 3, 5], 1: range(NEURONS)})
    assert not torch.allclose(first_output(model, tiny), expected)
    apply_plan(model, PruningPlan.for_model(model, **FIRST))
    torch.testing.assert_close(first_output(model, tiny), expected, rtol=0, atol=tolerance)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    torch.testing.assert_close(first_output(again, tiny), expected, rtol=0, atol=tolerance)
    apply_plan(again, PruningPlan.for_model(again, **SECOND))
    torch.testing.assert_close(first_output(again, tiny), first_output(both, tiny), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["clip_vision_model", "clip_text_model", "siglip_text_model"])
def test_towers_without_labels(name):
    tiny = TOWERS[name]
    dense, model = tiny.model(torch.float32), tiny.model(torch.float32)
    batches = [
        {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in make_batches(tiny, 2)
    ]
    scores = estimate_sensitivity(model, batches, progress=False)
    assert all((values > 0).any() for kind in scores.scores.values() for values in kind)
    apply_plan(model, plan_pruning(scores, model, ratio=0.5, neuron_multiple=1))
    before = (first_output(model, tiny) - first_output(dense, tiny)).norm()
    reconstruct(model, dense, batches, progress=False)
    assert (first_output(model, tiny) - first_output(dense, tiny)).norm() < before


def test_two_towers_are_refused_and_one_is_loaded_from_both(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    texts = {**sizes, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
    both = CLIPModel(CLIPConfig(vision_config={**sizes, "image_size": 8, "patch_size": 4}, text_config=texts)).eval()
    with pytest.raises(ValueError, match="CLIPModel has two towers.*Load one by CLIPVisionModel.from_pretrained or"):
        prune_heads(both, {0: [0]})
    both.save_pretrained(tmp_path)
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    tower.prune_heads({1: [2]})
    assert [group.num_components for group in find_groups(tower, ["heads"])] == [4, 3]


@pytest.mark.parametrize("name", ["beit", "clip", "dinov2", "siglip", "swin"])
def test_image_classification_pipeline(name, tmp_path):
    model = ZOO[name].model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, **FIRST))
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, IMAGE_PROCESSOR)(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(pixels_of(1, 0, (12, 10)))
    best, *_ = transformers.pipeline("image-classification", model=str(tmp_path))(image)
    expected = model(**processor(image, return_tensors="pt")).logits
    assert best["label"] == model.config.id2label[expected.argmax().item()]


def test_stages_of_swin(tmp_path):
    """Heads and widths differ between stages; layers are numbered through."""
    model, pixels = swin(), images()
    heads, neurons = find_groups(model, ["heads"]), find_groups(model, ["neurons"])
    assert [(group.original, group.head_size) for group in heads] == [(2, 4), (2, 4), (4, 4), (4, 4)]
    assert [group.original for group in neurons] == [16, 16, 32, 32]
    gone = {"heads": {1: [0], 2: [1, 3], 3: range(4)}, "neurons": {0: range(16), 3: [0, 7]}}
    expected = swin()
    for group in find_groups(expected):
        removed = list(gone[group.kind.name].get(group.layer, ()))
        weight = group.reader.module.weight.data
        weight.unflatten(1, (group.num_components, -1))[:, removed] = 0
    apply_plan(model, PruningPlan.for_model(model, **gone))
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(pixels).logits, expected(pixels).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_both_feed_forward_blocks_of_dinov2(gated):
    model, expected, pixels = dinov2(gated), dinov2(gated), images(8)
    (first, second) = find_groups(model, ["neurons"])
    assert first.num_components == second.num_components == (24 if gated else 32)
    assert [(writer.part, writer.parts) for writer in first.writers] == (
        [(0, 1)] if not gated else [(0, 1), (0, 1)] if DINOV2_RENAMED else [(0, 2), (1, 2)]
    )
    find_groups(expected, ["neurons"])[1].reader.module.weight.data[:, [0, 9]] = 0
    apply_plan(model, PruningPlan.for_model(model, neurons={1: [0, 9]}))
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits, rtol=0, atol=1e-10)


class MeanAlone(transformers.DeiTForImageClassificationWithTeacher):
    """Gives the mean of the two heads' logits without these."""

    def forward(self, pixel_values):
        return {"logits": super().forward(pixel_values=pixel_values).logits}


def test_logits_that_are_means_of_other_logits_are_counted_once():
    """Distilled DeiT returns both heads' logits and their mean."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.DeiTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    alone = MeanAlone(config).eval()
    alone.load_state_dict(model.state_dict())
    batches = [{"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.randint(0, 3, (6,))}]

    def loss_fn(model, batch):
        logits = model(pixel_values=batch["pixel_values"])["logits"]
        return torch.nn.functional.cross_entropy(logits, batch["labels"])

    for method in ("kronecker", "gauss_newton_trace"):
        wanted = estimate_sensitivity(alone, batches, method, loss_fn=loss_fn)
        # Its own loss is that against its own outputs, of the same curvature: its forward takes no labels.
        without_loss = estimate_sensitivity(model, batches, method)
        found = estimate_sensitivity(model, batches, method, loss_fn=loss_fn)
        for kind in ("heads", "neurons"):
            torch.testing.assert_close(found.scores[kind], wanted.scores[kind])
            torch.testing.assert_close(without_loss.scores[kind], wanted.scores[kind])
            assert all(scores.abs().sum() > 0 for scores in found.scores[kind])
