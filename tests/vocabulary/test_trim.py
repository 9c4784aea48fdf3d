"""Trimmed tokenizers and models beside the old ones: tokens are compared by their names, outputs bit by bit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from vocabularies import CORPUS, SEEN, TOKENIZERS, byte_bpe, model_for, wordpiece

from hap_transformers import PruningPlan, apply_plan, plan_vocabulary, prune_heads, trim_vocabulary
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.data.demo import demo_model_path


REAL = "WordPiece of MiniLM"


def real():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module", params=[*TOKENIZERS, REAL])
def pair(request):
    """A tokenizer before and after."""
    tokenizer = real() if request.param == REAL else TOKENIZERS[request.param]()
    model = AutoModel.from_pretrained(demo_model_path()) if request.param == REAL else model_for(tokenizer)
    before, old = copy.deepcopy(tokenizer), copy.deepcopy(model)
    plan = trim_vocabulary(model.eval(), tokenizer, SEEN)
    assert 0 < len(tokenizer) == len(plan.kept) < len(before)
    return before, tokenizer, old.eval(), model


def ids_of(tokenizer, texts, **settings):
    return tokenizer(texts, padding=True, return_tensors="pt", **settings)


def test_texts_seen_have_the_same_tokens(pair):
    before, after, *_ = pair
    for text in SEEN:
        assert after.tokenize(text) == before.tokenize(text)
        assert after.convert_ids_to_tokens(after(text)["input_ids"]) == before.convert_ids_to_tokens(
            before(text)["input_ids"]
        )


def test_outputs_for_texts_seen_are_equal_to_the_bit(pair):
    before, after, old, new = pair
    with torch.no_grad():
        expected, found = old(**ids_of(before, SEEN))[0], new(**ids_of(after, SEEN))[0]
    if expected.shape != found.shape:  # Logits of a language model: those of the tokens that are left.
        names = after.convert_ids_to_tokens(range(len(after)))
        expected = expected[..., before.convert_tokens_to_ids(names)]
    assert torch.equal(expected, found)


SYMBOLS = "".join(sorted({*"".join(CORPUS)}))
ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(SYMBOLS, max_size=12),
        st.sampled_from(" ".join(CORPUS).split()).flatmap(lambda word: st.sampled_from([word, " " + word, word[1:]])),
        st.sampled_from(["<s>", "<user>", "\u4eac\u90fd", "\U0001f389", "e\u0301", "\x00", "▁▁", "##ing", "<0x41>"]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_is_decoded_alike_and_as_known_as_before(pair, text):
    before, after, *_ = pair
    old, new = before(text)["input_ids"], after(text)["input_ids"]
    assert after.decode(new) == before.decode(old)
    assert new.count(after.unk_token_id) == old.count(before.unk_token_id)


def test_special_and_added_tokens_stay(pair):
    before, after, *_ = pair
    assert after.special_tokens_map == before.special_tokens_map
    added = [[str(token) for token in tokenizer.added_tokens_decoder.values()] for tokenizer in (before, after)]
    assert added[0] == added[1]


def test_ids_are_numbered_anew_in_their_order(pair):
    old, new = (tokenizer.get_vocab() for tokenizer in pair[:2])
    assert sorted(new.values()) == list(range(len(new)))
    assert sorted(new, key=new.__getitem__) == [token for token in sorted(old, key=old.__getitem__) if token in new]


def test_what_is_saved_is_what_is_loaded(pair, tmp_path):
    _, after, _, new = pair
    after.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    model = type(new).from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab() and again.all_special_ids == after.all_special_ids
    batch, found = ids_of(after, CORPUS), ids_of(again, CORPUS)
    assert all(torch.equal(batch[name], found[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(model.eval()(**found)[0], new(**batch)[0])
    if TRANSFORMERS_4 and (tmp_path / "vocab.txt").exists():
        assert len((tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()) == len(after)


def test_the_real_vocabulary_in_figures():
    model, tokenizer = AutoModel.from_pretrained(demo_model_path()), real()
    before, backend = model.num_parameters(), tokenizer.backend_tokenizer
    cut = backend.truncation
    words = {token for text in SEEN for token in tokenizer.tokenize(text)}
    single = {token for token in tokenizer.get_vocab() if len(token.removeprefix("##")) == 1}
    backend.enable_truncation(**cut)  # `tokenize` ends it.
    plan = plan_vocabulary(model, tokenizer, SEEN)
    assert set(tokenizer.convert_ids_to_tokens(plan.kept)) == words | single | set(tokenizer.all_special_tokens)
    assert backend.truncation == cut and len(tokenizer) == 30522
    trim_vocabulary(model, tokenizer, SEEN)
    assert plan.parameters == {"before": before, "after": model.num_parameters()}
    assert before - model.num_parameters() == (30522 - len(plan.kept)) * 384
    assert tokenizer.backend_tokenizer.truncation == cut


def test_rare_tokens_go_and_named_ones_stay():
    tokenizer = wordpiece()
    model, texts, rare = model_for(tokenizer), ["the river", "the mountains"], tokenizer.tokenize("mountains")[0]
    assert len(rare) > 1
    often = plan_vocabulary(model, tokenizer, texts, min_count=2)
    ids = tokenizer.convert_tokens_to_ids([rare, "the"])
    assert ids[0] not in often.kept and ids[1] in often.kept
    assert ids[0] in plan_vocabulary(model, tokenizer, texts, min_count=2, keep=[rare]).kept
    last = max(set(tokenizer.get_vocab().values()) - set(often.kept))
    assert last in plan_vocabulary(model, tokenizer, texts, keep=[last]).kept


def test_what_a_named_token_is_merged_from_stays():
    tokenizer = byte_bpe()
    trim_vocabulary(model_for(tokenizer), tokenizer, ["the"], keep=["Ġvill"])
    assert tokenizer.tokenize(" vill") == ["Ġvill"] and len(tokenizer.tokenize(" winter")) > 2


def test_settings_of_the_tokenizer_stay():
    tokenizer = byte_bpe()
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="<pad>", length=9)
    text, before = "<s> the river", copy.deepcopy(tokenizer)
    plan = trim_vocabulary(model_for(tokenizer), tokenizer, [text])
    backend = tokenizer.backend_tokenizer
    assert backend.padding == {**before.backend_tokenizer.padding, "pad_id": tokenizer.pad_token_id}
    assert tokenizer.pad_token_id < before.pad_token_id and backend.encode_special_tokens
    assert tokenizer.tokenize(text) == before.tokenize(text) and len(tokenizer.tokenize(text)) == plan.counts["tokens"]


@pytest.mark.parametrize("order", ["prune first", "trim first"])
def test_pruned_models(tmp_path, order):
    tokenizer = wordpiece()
    model, plan = model_for(tokenizer), {"heads": {0: [1], 1: range(4)}, "neurons": {0: range(0, 24, 2)}}
    expected, before = copy.deepcopy(model), copy.deepcopy(tokenizer)
    apply_plan(expected, PruningPlan.for_model(expected, **plan))
    steps = [
        lambda: apply_plan(model, PruningPlan.for_model(model, **plan)),
        lambda: trim_vocabulary(model, tokenizer, SEEN),
    ]
    for step in steps if order == "prune first" else reversed(steps):
        step()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == len(tokenizer) < len(before)
    kept = before.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    with torch.no_grad():
        dense, found = expected(**ids_of(before, SEEN)).logits, loaded(**ids_of(tokenizer, SEEN)).logits
    assert torch.equal(dense[..., kept], found)
    prune_heads(loaded, {0: [0]})


def test_a_trimmed_vocabulary_is_trimmed_again():
    tokenizer = byte_bpe()
    model = model_for(tokenizer)
    trim_vocabulary(model, tokenizer, CORPUS)
    first = len(tokenizer)
    trim_vocabulary(model, tokenizer, SEEN)
    assert model.config.vocab_size == len(tokenizer) < first
    again = trim_vocabulary(model, tokenizer, SEEN)
    assert again.kept == list(range(again.size))


# ---- on top of a trimmed model


def test_adapters_on_top(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = wordpiece()
    model = model_for(tokenizer)
    trim_vocabulary(model, tokenizer, SEEN)
    base, batch = copy.deepcopy(model), ids_of(tokenizer, SEEN)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "word_embeddings"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, adapted.eval()(**batch).logits)


@pytest.mark.any_release
def test_export_of_a_trimmed_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tokenizer = wordpiece()
    model = model_for(tokenizer, task="Model", num_hidden_layers=1)
    trim_vocabulary(model, tokenizer, SEEN)
    batch = dict(ids_of(tokenizer, SEEN, return_token_type_ids=False))
    torch.onnx.export(model, (), kwargs=batch, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    first, *_ = session.run(None, {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(first), model(**batch)[0].detach(), rtol=0, atol=1e-4)


def test_compiled_models_are_trimmed_inside():
    tokenizer = wordpiece()
    model = model_for(tokenizer)
    trim_vocabulary(torch.compile(model), tokenizer, SEEN)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
