"""Plans as data: files, old and new ids, and checks against a model."""

import copy
import dataclasses

import pytest
import torch
from vocabularies import SEEN, model_for, unigram, wordpiece

from hap_transformers import VocabularyPlan, apply_vocabulary, plan_vocabulary, trim_vocabulary


PLAN = VocabularyPlan([0, 2, 5], 7, "BPE", "bert", "digest", {"texts": 3}, {"before": 7000, "after": 3000})


def test_save_and_load(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert VocabularyPlan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"kept": [1, 1], "size": 2, "kind": "", "model_type": "", "vocabulary": ""}']
    + [f'{{"kept": {kept}, "size": 2, "kind": "", "model_type": "", "vocabulary": ""}}' for kept in ("[2]", "[0.5]")],
)
def test_loading_something_else(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is not a vocabulary plan"):
        VocabularyPlan.load(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError, match="No vocabulary plan at"):
        VocabularyPlan.load(tmp_path / "none.json")


def test_a_printed_plan_has_figures_instead_of_ids():
    assert repr(PLAN) == (
        "VocabularyPlan(keeps 3 of 7 ids; kind='BPE', model_type='bert', texts=3, parameters 7,000 -> 3,000)"
    )


def test_ids_of_texts_that_were_tokenized_before():
    assert PLAN.new_ids == {0: 0, 2: 1, 5: 2} and PLAN.renumber([5, -100, 0, 2, 2]) == [2, -100, 0, 1, 1]
    with pytest.raises(ValueError, match=r"The ids \[1, 6\] are gone .* Tokenize the text anew, or name them in"):
        PLAN.renumber([6, 0, 1])


def test_labels_of_old_ids():
    tokenizer = wordpiece()
    model, old = model_for(tokenizer), tokenizer(SEEN)["input_ids"]
    plan = trim_vocabulary(model, tokenizer, SEEN)
    assert [plan.renumber(ids) for ids in old] == tokenizer(SEEN)["input_ids"]


def test_a_plan_is_made_once_and_applied_elsewhere(tmp_path):
    tokenizer = wordpiece()
    model = model_for(tokenizer)
    plan_vocabulary(model, tokenizer, SEEN).save(tmp_path / "plan.json")
    other, other_tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    apply_vocabulary(other, other_tokenizer, VocabularyPlan.load(tmp_path / "plan.json"))
    trim_vocabulary(model, tokenizer, SEEN)
    assert other_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "The plan is for a 'roberta' with .* Make a plan for this model as it is now"),
        ({"vocabulary": "other"}, "the vocabulary 'other', but BertForMaskedLM .* the vocabulary '[0-9a-f]{16}'"),
        ({"size": 10_000}, "with 10000 ids"),
    ],
)
def test_plans_for_others_are_refused(change, message):
    tokenizer = wordpiece()
    model = model_for(tokenizer)
    plan = dataclasses.replace(plan_vocabulary(model, tokenizer, SEEN), **change)
    before, vocabulary = copy.deepcopy(model.state_dict()), tokenizer.get_vocab()
    with pytest.raises(ValueError, match=message):
        apply_vocabulary(model, tokenizer, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer.get_vocab() == vocabulary


def test_plans_that_remove_ids_in_use_are_refused():
    tokenizer = unigram()
    model = model_for(tokenizer)
    plan, vocabulary = plan_vocabulary(model, tokenizer, SEEN), tokenizer.get_vocab()
    plan.kept.remove(tokenizer.pad_token_id)
    with pytest.raises(ValueError, match=rf"removes ids that .* use, \[{tokenizer.pad_token_id}\]: \['<pad>'\]"):
        apply_vocabulary(model, tokenizer, plan)
    assert model.config.vocab_size == plan.size and tokenizer.get_vocab() == vocabulary
