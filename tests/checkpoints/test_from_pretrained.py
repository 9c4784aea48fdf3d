"""Plain `from_pretrained` reloads pruned models, with any of its options."""

import dataclasses
import functools
import json

import pytest
import torch
import transformers
from tiny import make_model
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer, TrainingArguments, pipeline
from zoo import HEADS, NEURONS, TWO_TOWERS, ZOO, logits

from hap_transformers import HapTrainer, PruningPlan, apply_plan


def prune(model, seed=0):
    """Removes a whole attention block, a whole feed-forward block, and parts of the others."""
    plans = [
        {"heads": {0: [1], 1: range(HEADS)}, "neurons": {0: range(NEURONS), 1: [0, 5]}},
        {"heads": {0: range(HEADS), 1: [0, 2]}, "neurons": {0: [7], 1: range(NEURONS)}},
    ]
    apply_plan(model, PruningPlan.for_model(model, **plans[seed]))
    return model


def trained(model):
    """Names of parameters that require gradients. Whisper's positions do so only after loading."""
    return {name for name, p in model.named_parameters() if p.requires_grad and "embed_positions" not in name}


def equal(model, other):
    """Whether two models have the same modules, weights and trained parameters."""
    classes, others = ({name: type(m).__name__ for name, m in m.named_modules()} for m in (model, other))
    state, state_of_other = model.state_dict(), other.state_dict()
    return (
        classes == others
        and state.keys() == state_of_other.keys()
        and all(torch.equal(tensor, state_of_other[name]) for name, tensor in state.items())
        and trained(model) == trained(other)
    )


def test_prune_save_reload_prune_save_reload(tmp_path, model_type):
    tiny = ZOO[model_type]
    model = tiny.model(torch.float32)
    first = {"heads": {0: [1]}, "neurons": {0: [0, 1]}}
    second = {"heads": {0: [0, 1], 1: range(HEADS)}, "neurons": {0: [3], 1: range(NEURONS)}}
    apply_plan(model, PruningPlan.for_model(model, **first))
    model.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    for part in (model, again):
        apply_plan(part, PruningPlan.for_model(part, **second))
    again.save_pretrained(tmp_path / "second")
    last = type(model).from_pretrained(tmp_path / "second")
    assert last.config.pruned_heads == {0: [0, 1], 1: [0, 1, 2, 3]}
    assert equal(last, model)
    # Kernels may round differently for other memory addresses.
    torch.testing.assert_close(logits(last, tiny), logits(model, tiny))


@functools.cache
def names_in_transformers():
    """To list them takes half a second."""
    return dir(transformers)


def head_classes(tiny):
    """Names of all classes of an architecture, except decoders without their encoder."""
    return [
        name
        for name in names_in_transformers()
        if name.startswith((tiny.family + "For", tiny.family + "Model", tiny.family + "LMHead"))
        and isinstance(getattr(transformers, name), type)
        and not name.endswith(("Output", "WithTeacher"))
        and getattr(transformers, name).config_class is type(tiny.config())
        and name not in ("BartForCausalLM", "WhisperForCausalLM", "CLIPModel", "SiglipModel")
        and name != "BeitForSemanticSegmentation"  # It reads outputs of more layers than a tiny model has.
    ]


def test_every_head_class(tmp_path, model_type):
    tiny = ZOO[model_type]
    names = head_classes(tiny)
    assert tiny.family + tiny.task in names
    for name in names:
        model = prune(dataclasses.replace(tiny, task=name.removeprefix(tiny.family)).model(torch.float32))
        model.save_pretrained(tmp_path / name)
        assert equal(type(model).from_pretrained(tmp_path / name), model), name


@pytest.mark.parametrize("model_type", ["bart", "whisper"])
def test_a_decoder_alone_is_refused(model_type):
    model = dataclasses.replace(ZOO[model_type], task="ForCausalLM").model()
    with pytest.raises(ValueError, match="ForCausalLM has no module 'encoder.layers'.*cannot be scored or pruned"):
        model.prune_heads({0: [0]})


@pytest.mark.parametrize("model_type", sorted(ZOO.keys() - TWO_TOWERS))
def test_loads_under_another_head(tmp_path, model_type):
    model = prune(ZOO[model_type].model(torch.float32))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    weights, loaded = model.base_model.state_dict(), base.base_model.state_dict()
    shared = [name for name in loaded if name in weights]
    assert len(shared) > 0.9 * min(len(loaded), len(weights)) and all(
        torch.equal(weights[name], loaded[name]) for name in shared
    )


@pytest.mark.parametrize(
    "save, load",
    [
        ({}, {"device_map": "cpu"}),
        ({}, {"low_cpu_mem_usage": True}),
        ({"max_shard_size": "3KB"}, {}),
        ({}, {"use_safetensors": True}),
        ({}, {"num_labels": 5, "ignore_mismatched_sizes": True}),
    ],
    ids=str,
)
def test_options_of_saving_and_loading(tmp_path, save, load):
    model = prune(make_model(dtype=torch.float32))
    model.save_pretrained(tmp_path, **save)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in save)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, **load)
    assert equal(again.bert, model.bert) and again.num_labels == load.get("num_labels", 2)


def test_pipeline(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    model = prune(make_model(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    (result,) = classify("good bad")
    expected = model(**tokenizer("good bad", return_tensors="pt")).logits.softmax(1)
    assert result["score"] == pytest.approx(expected.max().item(), rel=1e-6)
    assert result["label"] == f"LABEL_{expected.argmax().item()}"


def examples(count=16):
    batch = ZOO["bert"].batch(count)
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return [{**row, "labels": torch.tensor(i % 2)} for i, row in enumerate(rows)]


def test_trainer_resumes_from_a_checkpoint(tmp_path):
    """Training that is interrupted after two steps and resumed ends with the same weights."""

    def train(model, steps, resume=None):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        HapTrainer(model, args, train_dataset=examples()).train(resume_from_checkpoint=resume)
        return model

    whole = train(prune(make_model(dtype=torch.float32)), 4)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = train(AutoModelForSequenceClassification.from_pretrained(checkpoint), 4, str(checkpoint))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_lora_on_a_pruned_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = prune(make_model(dtype=torch.float32))
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", lora_dropout=0.0)
    adapted = peft.get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # The second factor is zero in the first step.
        adapted(**ZOO["bert"].batch()).logits.square().sum().backward()
        optimizer.step()
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ZOO["bert"]), logits(adapted, ZOO["bert"]))
    assert not torch.equal(logits(loaded, ZOO["bert"]), logits(model, ZOO["bert"]))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ZOO["bert"]), logits(adapted, ZOO["bert"]))


def test_the_reloaded_model_is_ordinary(tmp_path):
    """The loader leaves no trace: the model can be cast, and its config is plain JSON."""
    model = make_model(dtype=torch.float32)
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(again, "hf_quantizer") or again.hf_quantizer is None
    assert not {"_is_quantized", "_pre_quantization_dtype"} & vars(again.config).keys()
    again.double()
    recorded = json.loads(again.config.to_json_string())["quantization_config"]
    assert recorded == {"quant_method": "hap", "heads": {"0": HEADS - 1}, "neurons": {}}


def test_dense_models_are_not_marked(tmp_path):
    model = make_model(dtype=torch.float32)
    model.prune_heads({})
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_pickled_weights_are_refused(tmp_path):
    model = prune(make_model(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="from safetensors only"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_pruned_checkpoint_below_a_dense_one(tmp_path):
    dense = make_model(dtype=torch.float32)
    dense.save_pretrained(tmp_path)
    pruned = prune(make_model(dtype=torch.float32))
    pruned.save_pretrained(tmp_path / "checkpoint-5")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, subfolder="checkpoint-5")
    assert equal(loaded, pruned)
