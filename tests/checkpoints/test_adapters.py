"""PEFT's adapters on pruned models: they are saved and loaded, and stand in the way of further pruning."""

import pytest
import torch
from convnets import CONVNETS, with_one_emptied
from dims import CASES, without
from peft import LoraConfig
from zoo import ZOO

from hap_transformers import PruningPlan, apply_plan, emptied_modules
from hap_transformers.components.groups import find_groups
from hap_transformers.components.slicing import validate_sliceable


def with_fewer_components(name):
    model = ZOO[name].model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: [0, 2], 1: [3]}))
    return model, ZOO[name].batch(dtype=torch.float32)


def with_fewer_dimensions(name):
    return without(ZOO[name].model(torch.float32), ZOO[name], CASES["a head"]), ZOO[name].batch(dtype=torch.float32)


def with_fewer_channels(name):
    return with_one_emptied(CONVNETS[name], torch.float32), CONVNETS[name].batch(dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((with_fewer_components, name) for name in sorted(ZOO)),
        *((with_fewer_dimensions, name) for name in ("bert", "deberta-v3", "gpt2", "llama", "modernbert", "mpnet")),
        # The padding of MobileNetV2 reads the stride of its convolutions, which adapters hide, pruned or not.
        *((with_fewer_channels, name) for name in CONVNETS if name != "mobilenet_v2"),
    ],
)
def test_adapters_of_all_that_is_pruned(tmp_path, make, name):
    """Of every way to store a linear map."""
    model, batch = make(name)
    model.save_pretrained(tmp_path / "base")
    emptied = {path.removeprefix(f"{model.base_model_prefix}.") for path in emptied_modules(model)}
    names = {
        projection.name
        for group in find_groups(model)
        for projection in (*group.writers, *group.readers)
        if getattr(projection.module, "groups", 1) == 1
    }
    config = LoraConfig(r=2, target_modules=sorted(names - emptied), init_lora_weights=False, lora_dropout=0.0)
    model.add_adapter(config)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again = type(model).from_pretrained(tmp_path / "base")
    before = again(**batch).logits
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(again(**batch).logits, expected)
    assert not torch.allclose(before, expected)
    with pytest.raises(ValueError, match=r"is a peft\..* merge adapters"):
        validate_sliceable(model, find_groups(model))
