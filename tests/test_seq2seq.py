"""Encoder-decoders from scores to a checkpoint: one budget for the encoder, the decoder and its cross-attention."""

import copy
import json
import random
import subprocess
import sys

import pytest
import torch
from seq2seq import CROSS, ENCODER, SELF, SEQ2SEQ
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DataCollatorForSeq2Seq,
    GenerationMixin,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
)

from hap_transformers import (
    METHODS,
    HapConfig,
    HapTrainer,
    PruningPlan,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    export_remote_code,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.cli.info import info
from hap_transformers.components.groups import find_groups
from hap_transformers.reporting.card import make_model_card
from hap_transformers.reporting.plots import plot_head_ranks


@pytest.fixture(params=sorted(SEQ2SEQ))
def tiny(request):
    return SEQ2SEQ[request.param]


def sensitivity_of(model, tiny, method="kronecker", components=("heads", "neurons")):
    batches = [tiny.batch(4, dtype=model.dtype, seed=seed) for seed in range(2)]
    settings = {"components": components, "progress": False, "num_probes": 2}
    return estimate_sensitivity(model, batches, method, **settings)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_scores_all_groups(method):
    tiny = SEQ2SEQ["whisper"]
    model = tiny.model(attn_implementation="eager")
    kinds = ("heads",) if method == "fisher" else ("heads", "neurons")
    found = sensitivity_of(model, tiny, method, kinds)
    for kind in kinds:
        counts = [group.num_components for group in find_groups(model, [kind])]
        assert [len(scores) for scores in found.scores[kind]] == counts
        assert all(scores.abs().sum() > 0 for scores in found.scores[kind])


def test_the_whole_road(tiny, tmp_path):
    kinds = ("heads", "neurons") if tiny.audio else ("query_key_dims", "value_dims", "neurons")
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


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_gives_its_caches_back_where_a_cross_attention_has_no_heads(num_beams):
    """Whisper indexes the keys of every layer of a returned cache."""
    tiny = SEQ2SEQ["whisper"]
    dense, removed = tiny.model(torch.float32), {"heads": {CROSS[0]: list(range(tiny.decoder_heads))}}
    inputs = {"input_features": tiny.batch(dtype=torch.float32)["input_features"]}
    settings = {"max_new_tokens": 6, "num_beams": num_beams, "return_dict_in_generate": True, "output_scores": True}
    models = without(dense, **removed), tiny.masked(dense, **removed)
    found, wanted = (model.generate(**inputs, **settings) for model in models)
    assert torch.equal(found["sequences"], wanted["sequences"])


def without(model, **removed):
    """A model that has lost components."""
    pruned = copy.deepcopy(model)
    apply_plan(pruned, PruningPlan.for_model(pruned, **removed))
    return pruned


@pytest.mark.parametrize("layer", [SELF[1], CROSS[0], CROSS[1]])
def test_a_refit_makes_up_for_heads_that_others_repeat(tiny, layer):
    """The second head of a layer gives what the first does, so without it the output projection gives the same."""
    dense = tiny.model()
    (group,) = (group for group in find_groups(dense, ["heads"]) if group.layer == layer)
    for writer in group.writers:
        for tensor in writer.parameters:
            rows = tensor.data.unflatten(0, (group.original, -1))
            rows[1] = rows[0]
    if tiny.family == "T5":
        biases = dense.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
        biases[:, 1] = biases[:, 0]
    pruned, batches = without(dense, heads={layer: [1]}), [tiny.batch(8, seed=seed) for seed in range(2)]
    wanted = dense(**batches[0]).logits
    assert (pruned(**batches[0]).logits - wanted).abs().max() > 1e-4
    reconstruct(pruned, dense, batches, ridge=1e-12, progress=False)
    torch.testing.assert_close(pruned(**batches[0]).logits, wanted, rtol=0, atol=1e-5)


def test_a_refit_is_least_squares_over_the_tokens_whose_labels_count(tiny):
    """Of a cross-attention whose queries and all before it stay as they are."""
    dense, layer, batch = tiny.model(), CROSS[1], tiny.batch(12)
    pruned = without(dense, heads={layer: [0]})
    path = tiny.reader("heads", layer)
    counts = batch["labels"] != -100
    (x, before), (_, y) = (calls_of(model, path, batch) for model in (pruned, dense))
    bias = pruned.get_submodule(path).bias is not None
    x, y = (tensor[counts] for tensor in (x, y))
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = x @ torch.linalg.lstsq(x, y).solution
    reconstruct(pruned, dense, [batch], ridge=1e-12, progress=False)
    _, found = calls_of(pruned, path, batch)
    torch.testing.assert_close(found[counts], expected, rtol=1e-5, atol=1e-6)
    assert (before[counts] - expected).abs().max() > 1e-3


def calls_of(model, path, batch):
    """What a projection read and gave."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def test_layers_are_tuned_and_heads_aligned(tiny):
    dense, batches = tiny.model(), [tiny.batch(8, seed=seed) for seed in range(2)]
    if not tiny.audio:  # The encoder reads fewer tokens than are decoded.
        batches = [b | {name: b[name][:, :6] for name in ("input_ids", "attention_mask")} for b in batches]
    model = copy.deepcopy(dense)
    align_heads(model, batches, progress=False)
    torch.testing.assert_close(model(**batches[0]).logits, dense(**batches[0]).logits, rtol=0, atol=1e-10)
    for layer in (SELF[0], CROSS[0]):
        assert not torch.equal(*(m.get_submodule(tiny.reader("heads", layer)).weight for m in (model, dense)))
    model = without(dense, heads={SELF[0]: [0], CROSS[1]: [1]}, neurons={1: [0, 1, 2], SELF[1]: [5, 6, 7]})
    reconstruct(model, dense, batches, progress=False)

    def error():
        with torch.no_grad():
            return sum((model(**b).logits - dense(**b).logits)[b["labels"] != -100].square().sum() for b in batches)

    before = error()
    tune_layers(model, dense, batches, epochs=20, progress=False)
    assert error() < before


def test_plans_and_checkpoints_of_an_encoder_alone(tiny, tmp_path):
    """Files from before decoders had components name those of the encoder only."""
    gone = {"query_key_dims": {0: [1], 1: [3, 4]}, "value_dims": {0: [2]}, "neurons": {1: [0, 5]}}
    model = tiny.model(torch.float32)
    plan = PruningPlan.for_model(model, **gone)
    plan.original = {kind: counts[:ENCODER] for kind, counts in plan.original.items()}
    plan.save(tmp_path / "plan.json")
    apply_plan(model, PruningPlan.load(tmp_path / "plan.json"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("query_key_dims", "value_dims"):
        layers = config["quantization_config"][kind]
        assert len(layers) == ENCODER + 2 * len(SELF)
        config["quantization_config"][kind] = {layer: layers[layer] for layer in map(str, range(ENCODER))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = copy.deepcopy(type(model).from_pretrained(tmp_path, torch_dtype=torch.float32).eval())
    batch = tiny.batch(dtype=torch.float32)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    apply_plan(again, PruningPlan.for_model(again, value_dims={CROSS[0]: [1]}))
    again.save_pretrained(tmp_path)
    last = copy.deepcopy(type(model).from_pretrained(tmp_path, torch_dtype=torch.float32).eval())
    assert torch.equal(last(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_batches_with_nothing_to_decode(family):
    """BART then decodes what its encoder reads."""
    tiny = SEQ2SEQ[family]
    dense, batch = tiny.model(), tiny.batch()
    del batch["labels"]
    pruned = without(dense, heads={SELF[0]: [0]})
    with pytest.raises(ValueError, match="has nothing to decode. Give batches with `labels`"):
        estimate_sensitivity(dense, [batch], progress=False)
    with pytest.raises(ValueError, match="has nothing to decode. Give batches with `labels`"):
        reconstruct(pruned, dense, [batch], progress=False)


LOAD = """
import sys; sys.modules["hap_transformers"] = None
import copy, torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    load = getattr(transformers, auto).from_pretrained
    model = copy.deepcopy(load(folder, trust_remote_code=True, torch_dtype=torch.float32).eval())
    torch.save(model(**torch.load(folder + "/batch.pt")).logits, folder + "/logits.pt")
"""


@pytest.mark.slow
def test_remote_code(tmp_path):
    """The exported code loads the checkpoints in a process that has no such package."""
    gone = {"heads": {0: [1], SELF[0]: [0], CROSS[1]: [0, 1]}, "neurons": {SELF[0]: [1]}}
    models = {tmp_path / name: without(own.model(torch.float32), **gone) for name, own in SEQ2SEQ.items()}
    arguments = []
    for folder, model in models.items():
        tiny = SEQ2SEQ[folder.name]
        model.save_pretrained(folder)
        export_remote_code(folder)
        torch.save(tiny.batch(dtype=torch.float32), folder / "batch.pt")
        arguments += [str(folder), "AutoModelForSpeechSeq2Seq" if tiny.audio else "AutoModelForSeq2SeqLM"]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True)
    for folder, model in models.items():
        assert torch.equal(torch.load(folder / "logits.pt"), model(**torch.load(folder / "batch.pt")).logits)


@pytest.mark.parametrize("family, with_decoder_inputs", [("bart", True), ("t5", False)])
def test_a_trainer_with_a_seq2seq_collator(family, with_decoder_inputs, tmp_path):
    tiny = SEQ2SEQ[family]
    model, generator = tiny.model(torch.float32), random.Random(0)
    rows = [
        {
            "input_ids": [generator.randrange(3, 40) for _ in range(generator.randrange(3, 8))],
            "labels": [generator.randrange(3, 40) for _ in range(generator.randrange(3, 8))],
        }
        for _ in range(24)
    ]
    words = {f"[{number}]": number for number in range(40)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="[0]")
    collator = DataCollatorForSeq2Seq(tokenizer, model if with_decoder_inputs else None)
    arguments = {"per_device_train_batch_size": 4, "max_steps": 3, "use_cpu": True, "report_to": [], "save_steps": 1}
    trainer = HapTrainer(
        model,
        Seq2SeqTrainingArguments(str(tmp_path), **arguments),
        data_collator=collator,
        train_dataset=rows,
        hap_config=HapConfig(ratio=0.5, neuron_multiple=4, max_examples=16, distillation_hidden=0.5),
    )
    plan = trainer.prune()
    assert {layer for layers in plan.removed.values() for layer in layers} & {*SELF, *CROSS}
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path))
    again = copy.deepcopy(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval())
    batch = tiny.batch(dtype=torch.float32)
    assert torch.equal(again(**batch).logits, trainer.model.eval()(**batch).logits)


def test_info_and_card_say_how_layers_are_numbered(tmp_path, capsys):
    tiny = SEQ2SEQ["bart"]
    model = without(tiny.model(torch.float32), value_dims={0: [1], CROSS[0]: [0, 3]})
    card = make_model_card(model)
    model.save_pretrained(tmp_path)
    plot_head_ranks(model, tmp_path / "ranks.png")
    info(str(tmp_path), length=8)
    for text in (str(card), capsys.readouterr().out):
        assert "Layers 0 to 2 are the encoder's, 3 to 4 are the decoder's, 5 to 6 are the decoder's cross-att" in text
