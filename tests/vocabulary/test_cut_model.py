"""Models of many forms: every tensor and every id that a vocabulary has a part in."""

import copy

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    GPT2ForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
)
from vocabularies import SEEN, byte_bpe, model_for, space_bpe, unigram, wordpiece

from hap_transformers import trim_vocabulary


# By model type: the class, and settings of the config.
FORMS = {
    "albert": ("ForMaskedLM", {}),  # with a bias that two modules have
    "bart": ("ForConditionalGeneration", {"decoder_start_token_id": 2}),  # with a buffer
    "bert": ("ForMaskedLM", {}),
    "deberta-v3": ("ForMaskedLM", {}),
    "distilbert": ("ForMaskedLM", {"tie_word_embeddings": False}),
    "electra": ("ForMaskedLM", {}),
    "gpt2": ("LMHeadModel", {"n_positions": 128}),
    "llama": ("ForCausalLM", {"tie_word_embeddings": False}),
    "modernbert": ("ForMaskedLM", {}),
    "mpnet": ("ForMaskedLM", {}),
    "qwen3": ("ForCausalLM", {"tie_word_embeddings": True}),
    "t5": ("ForConditionalGeneration", {"decoder_start_token_id": 2, "tie_word_embeddings": False}),
    "t5-gated": ("ForConditionalGeneration", {"decoder_start_token_id": 2}),  # three modules with one tensor
}


def inputs(model, tokenizer):
    batch = dict(tokenizer(SEEN, padding=True, return_tensors="pt", return_token_type_ids=False))
    return {**batch, "decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else batch


def run(model, tokenizer):
    with torch.no_grad():
        return model(**inputs(model, tokenizer))[0]


def names(tokenizer):
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_trimming_in_inference_mode_leaves_a_model_that_trains():
    tokenizer = wordpiece()
    model = model_for(tokenizer, "bert", "ForMaskedLM", more=7)
    with torch.inference_mode():
        trim_vocabulary(model, tokenizer, SEEN)
    model(**inputs(model, tokenizer)).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_the_tokens_left_are_equal_to_the_bit(form, tmp_path):
    task, settings = FORMS[form]
    tokenizer = unigram()
    model = model_for(tokenizer, form, task, more=7, **settings)
    if form == "bart":
        torch.nn.init.normal_(model.final_logits_bias)
    before, old = copy.deepcopy(tokenizer), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules, expected = list(model.modules()), run(old, before)
    plan = trim_vocabulary(model, tokenizer, SEEN)
    kept = before.convert_tokens_to_ids(names(tokenizer))
    assert torch.equal(run(model, tokenizer), expected[..., kept])
    assert list(model.modules()) == modules and not any(p.requires_grad for p in model.parameters())
    assert model.num_parameters() == plan.parameters["after"] < plan.parameters["before"] == old.num_parameters()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, tokenizer), run(model, tokenizer))
    embeddings, heads = model.get_input_embeddings(), model.get_output_embeddings()
    tied = old.get_output_embeddings().weight is old.get_input_embeddings().weight
    assert (heads.weight is embeddings.weight) == tied
    assert repr(embeddings) == repr(again.get_input_embeddings())
    assert heads.out_features == embeddings.num_embeddings == model.config.vocab_size == len(tokenizer)


def test_positions_that_are_numbered_from_the_padding_on():
    """RoBERTa's padding keeps its id, and all before it stay; else every position would move."""
    tokenizer = byte_bpe()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(300)
    model = model_for(tokenizer, "roberta", pad_token_id=300, max_position_embeddings=400)
    before, old = copy.deepcopy(tokenizer), copy.deepcopy(model)
    plan = trim_vocabulary(model, tokenizer, SEEN)
    assert plan.kept[:301] == list(range(301)) and model.config.pad_token_id == 300 and len(plan.kept) < plan.size
    kept = before.convert_tokens_to_ids(names(tokenizer))
    assert torch.equal(run(model, tokenizer), run(old, before)[..., kept])


def test_ids_in_configs():
    """Every id names the same token as before."""
    tokenizer = space_bpe()
    model = model_for(tokenizer, "bart", "ForConditionalGeneration", decoder_start_token_id=tokenizer.eos_token_id)
    a, b, c, *_ = (id for token, id in sorted(tokenizer.get_vocab().items()) if len(token) > 3)
    model.config.image_token_index = c
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, a],
        forced_bos_token_id=10**6,  # beyond the vocabulary, before and afterwards
        suppress_tokens=[a, -1],
        bad_words_ids=[[a, b], [c]],
        sequence_bias={(b, c): -1.0},
        forced_decoder_ids=[[1, b], [a, c]],  # a position that is also an id
    )
    model.generation_config.lang_to_id = {"<|en|>": b}
    settings = {"decoder_start_token_id": a, "max_length": b, "bad_words_ids": [[c]]}
    model.config.task_specific_params = {"translation": settings, "summarization": None}
    before, generation = copy.deepcopy(tokenizer), copy.deepcopy(model.generation_config)
    trim_vocabulary(model, tokenizer, SEEN)

    def new(number):
        return tokenizer.convert_tokens_to_ids(before.convert_ids_to_tokens(number))

    found = model.generation_config
    assert new(a) != a and tokenizer.unk_token_id not in (new(a), new(b), new(c))
    assert found.eos_token_id == [tokenizer.eos_token_id, new(a)] and found.bos_token_id == tokenizer.bos_token_id
    assert found.suppress_tokens == [new(a), -1] and found.bad_words_ids == [[new(a), new(b)], [new(c)]]
    assert found.sequence_bias == {(new(b), new(c)): -1.0} and found.forced_decoder_ids == [[1, new(b)], [a, new(c)]]
    assert found.lang_to_id == {"<|en|>": new(b)} and found.forced_bos_token_id == generation.forced_bos_token_id
    config = model.config
    assert (config.pad_token_id, config.bos_token_id) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    assert config.decoder_start_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert config.image_token_index == new(c)
    settings = {"decoder_start_token_id": new(a), "max_length": b, "bad_words_ids": [[new(c)]]}
    assert config.task_specific_params == {"translation": settings, "summarization": None}
    assert model.model.encoder.padding_idx == model.get_input_embeddings().padding_idx == tokenizer.pad_token_id


def test_classifiers_find_the_last_token_by_the_padding():
    tokenizer = byte_bpe()
    settings = {"n_positions": 128, "num_labels": 3}
    model = model_for(tokenizer, "gpt2", "ForSequenceClassification", **settings)
    assert isinstance(model, GPT2ForSequenceClassification)
    before, expected = tokenizer.pad_token_id, run(model, tokenizer)
    trim_vocabulary(model, tokenizer, SEEN)
    assert tokenizer.pad_token_id < before and torch.equal(run(model, tokenizer), expected)


def clip(tokenizer):
    """A composite model: its config has one for texts, and one for images."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4})).eval()


@pytest.mark.parametrize("copied", [False, True])
def test_composite_models_whose_modules_know_the_end_token(copied, tmp_path):
    """CLIP's embedding is that of the end token, whose id its module keeps; T5's modules have copies of configs."""
    tokenizer = wordpiece()
    model, old, before = clip(tokenizer), clip(tokenizer), copy.deepcopy(tokenizer)
    for module in model.text_model.modules() if copied else ():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
    old.load_state_dict(model.state_dict())
    trim_vocabulary(model, tokenizer, SEEN)
    assert model.text_model.eos_token_id == model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.vocab_size == model.text_model.config.vocab_size == len(tokenizer)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, *found = (
            of_text.text_model(**inputs(model, given)).pooler_output
            for of_text, given in ((old, before), (model, tokenizer), (CLIPModel.from_pretrained(tmp_path), tokenizer))
        )
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


def test_tokenizers_that_keep_ids_of_languages():
    tokenizer = space_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["eng_Latn", "fra_Latn"]})
    english, french = tokenizer.convert_tokens_to_ids(["eng_Latn", "fra_Latn"])
    vars(tokenizer).update(cur_lang_code=english, prefix_tokens=[english], lang_code_to_id={"fra_Latn": french})
    config = M2M100Config(
        vocab_size=len(tokenizer), d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, forced_bos_token_id=french,
    )  # fmt: skip
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(config).eval()
    before, expected = copy.deepcopy(tokenizer), run(model, tokenizer)
    trim_vocabulary(model, tokenizer, SEEN)
    kept = before.convert_tokens_to_ids(names(tokenizer))
    assert torch.equal(run(model, tokenizer), expected[..., kept])
    english, french = tokenizer.convert_tokens_to_ids(["eng_Latn", "fra_Latn"])
    assert tokenizer.cur_lang_code == english and tokenizer.prefix_tokens == [english]
    assert tokenizer.lang_code_to_id == {"fra_Latn": french}
