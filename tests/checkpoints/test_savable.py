"""`save_pretrained` refuses what could not be loaded again, before it writes anything."""

import copy
import dataclasses

import pytest
import torch
from tiny import make_batch, make_model
from trainers import make_trainer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from zoo import TWO_TOWERS, ZOO, logits

from hap_transformers import HapConfig, PruningPlan, apply_plan
from hap_transformers.components.releases import TRANSFORMERS_4


REMOVED = {"heads": {0: [1]}, "neurons": {1: range(8)}}


def pruned(model, **removed):
    apply_plan(model, PruningPlan.for_model(model, **(removed or REMOVED)))
    return model


def with_swapped_encoder(**removed):
    """A classifier in which an encoder that was pruned by itself took the dense one's place."""
    model = make_model(dtype=torch.float32)
    model.bert = pruned(BertModel(copy.deepcopy(model.config)), **removed)
    assert model(**make_batch()).logits.isfinite().all()
    return model


@pytest.mark.parametrize("removed", [REMOVED, {"heads": {1: [0, 2]}}, {"neurons": {0: range(24)}}], ids=str)
def test_a_swapped_encoder_is_refused(tmp_path, removed):
    model = with_swapped_encoder(**removed)
    with pytest.raises(ValueError, match="'bert' of this BertForSequenceClassification was pruned"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not TRANSFORMERS_4, reason="Transformers 5 saves nothing but safetensors")
def test_another_format_is_refused(tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense", safe_serialization=False)
    with pytest.raises(ValueError, match="safe_serialization=False saves pytorch_model.bin"):
        pruned(model).save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_an_encoder_pruned_in_another_way_is_refused(tmp_path):
    model = pruned(make_model(dtype=torch.float32))
    model.bert = pruned(BertModel(make_model().config), heads={0: [1, 2]})
    with pytest.raises(ValueError, match="config"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_dense_encoder_in_a_pruned_model_is_refused(tmp_path):
    """The config says that heads are gone which are there."""
    model = pruned(make_model(dtype=torch.float32))
    model.bert = BertModel(make_model().config)
    with pytest.raises(ValueError, match="Nothing was"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_swapped_encoder_is_saved_as_the_message_says(tmp_path):
    """With the same config before pruning, or as the whole model loaded from the encoder's checkpoint."""
    model = make_model(dtype=torch.float32)
    model.bert = pruned(BertModel(model.config))
    model.save_pretrained(tmp_path / "same config")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "same config").eval()
    torch.testing.assert_close(logits(loaded, ZOO["bert"]), logits(model.eval(), ZOO["bert"]))
    swapped = with_swapped_encoder()
    swapped.bert.save_pretrained(tmp_path / "encoder")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder")
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(again.bert.parameters(), swapped.bert.parameters(), strict=True))


@pytest.mark.parametrize(
    "removed, kept, refused",
    [
        ({"heads": {1: [0]}}, [0], True),
        ({"neurons": {1: range(8)}}, [0], True),
        ({"heads": {0: [0]}}, [1], True),
        ({"heads": {0: [0]}, "neurons": {0: range(8)}}, [1, 0], True),
        ({"neurons": {0: range(8)}}, [0], False),  # What is recorded of the layers that are left is true.
    ],
    ids=str,
)
def test_layers_dropped_after_pruning(tmp_path, removed, kept, refused):
    """Unless the config still tells the truth of what is left."""
    model = pruned(make_model(dtype=torch.float32), **removed)
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = torch.nn.ModuleList([layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    expected = logits(model, ZOO["bert"])
    if refused:
        with pytest.raises(ValueError, match="(?i)layer"):
            model.save_pretrained(tmp_path / "model")
        assert not list(tmp_path.iterdir())
    else:
        model.save_pretrained(tmp_path / "model")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(logits(loaded, ZOO["bert"]), expected)


def test_layers_dropped_before_pruning(tmp_path):
    model = make_model(dtype=torch.float32)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    pruned(model, heads={0: [1]}, neurons={0: range(8)}).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ZOO["bert"]), logits(model, ZOO["bert"]))


@pytest.mark.parametrize("model_type", sorted(ZOO.keys() - {"whisper", *TWO_TOWERS}))  # They have no such part.
def test_parts_of_a_pruned_model_are_saved(model_type, tmp_path):
    """The base model has the config of the whole. Some classifiers have no pooler or decoder, which are then new."""
    model = pruned(ZOO[model_type].model(torch.float32))
    model.base_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in model.base_model.named_parameters())
    assert loaded.config.quantization_config == model.config.quantization_config


def test_another_task_from_the_part_of_a_pruned_model(tmp_path):
    model = pruned(make_model(dtype=torch.float32))
    model.bert.save_pretrained(tmp_path / "encoder")
    other = BertForMaskedLM.from_pretrained(tmp_path / "encoder")
    other.save_pretrained(tmp_path / "words")
    again = BertForMaskedLM.from_pretrained(tmp_path / "words")
    shared = dict(again.bert.named_parameters())
    assert all(torch.equal(p, shared[name]) for name, p in model.bert.named_parameters() if "pooler" not in name)


def test_a_pruned_encoder_in_a_model_of_ones_own_is_saved(tmp_path):
    """Its config is that of the whole, as `from_pretrained` makes it."""

    class Pair(BertForSequenceClassification):
        """Two encoders with one config, of which both are pruned alike."""

        def __init__(self, config):
            super().__init__(config)
            self.second = torch.nn.Linear(2, 2)

    model = Pair(make_model().config)
    pruned(model).save_pretrained(tmp_path)
    loaded = Pair.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_dense_models_are_saved_as_ever(tmp_path):
    for name, model in (("bert", make_model(dtype=torch.float32)), ("t5", ZOO["t5"].model(torch.float32))):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_the_trainer_saves_nothing_of_what_could_not_be_loaded(tmp_path):
    """Neither at the end nor as a checkpoint."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.model.bert = with_swapped_encoder(neurons={1: range(8)}).bert
    for save in (trainer.save_model, trainer.train):
        with pytest.raises(ValueError, match="was pruned, but the config of the whole model"):
            save()
        assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("config.json"))


def test_it_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="was pruned, but the config of the whole model"):
        make_trainer(tmp_path, model=with_swapped_encoder(neurons={1: range(8)}), hap_config=HapConfig(ratio=0.5))


def test_a_pruned_encoder_of_an_encoder_decoder_is_saved(tmp_path):
    tiny = dataclasses.replace(ZOO["t5"], task="ForConditionalGeneration")
    model = pruned(tiny.model(torch.float32), heads={0: [1]}, neurons={1: range(8)})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
