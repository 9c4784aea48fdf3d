"""`trim_vocabulary=True`: model, tokenizer and data sets get new ids together, or nothing changes."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments
from vocabularies import SEEN, TOKENIZERS, UNSEEN, model_for

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.efficiency import count_parameters


pytestmark = pytest.mark.any_release
CONFIG = HapConfig(budget="model", ratio=0.3, trim_vocabulary=True, max_examples=8, recovery_check="none")


def tokenized(tokenizer, texts):
    rows = {"text": texts, "label": [i % 2 for i in range(len(texts))]}
    return Dataset.from_dict(rows).map(lambda part: tokenizer(part["text"]), batched=True, remove_columns="text")


def parts(task="ForSequenceClassification"):
    tokenizer = TOKENIZERS["WordPiece"]()
    return model_for(tokenizer, task=task).eval(), tokenizer, tokenized(tokenizer, 4 * SEEN)


def make(folder, model, tokenizer, rows, config=CONFIG, **given):
    args = TrainingArguments(
        str(folder), num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    given["model"] = None if "model_init" in given else model
    return HapTrainer(args=args, train_dataset=rows, processing_class=tokenizer, hap_config=config, **given)


def logits(model, tokenizer, texts):
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits


def test_a_whole_run(tmp_path):
    model, tokenizer, rows = parts()
    held_out = tokenized(tokenizer, UNSEEN[:1])
    whole, before, dense = len(tokenizer), logits(model, tokenizer, SEEN), count_parameters(model)
    trainer = make(tmp_path, model, tokenizer, rows, eval_dataset=held_out)
    assert len(tokenizer) == len(trainer.vocabulary_plan.kept) < whole
    torch.testing.assert_close(logits(model, tokenizer, SEEN), before)
    # The data sets are as if they had been tokenized by the new tokenizer, those of the evaluation, too.
    for given, texts in ((trainer.train_dataset, 4 * SEEN), (trainer.eval_dataset, UNSEEN[:1])):
        assert given["input_ids"] == tokenized(tokenizer, texts)["input_ids"]
    assert given["label"] == held_out["label"]
    trainer.prune()
    assert trainer.results["parameters"]["dense"] == trainer.vocabulary_plan.parameters["after"]
    trainer.create_model_card()
    trimmed = f"the vocabulary was trimmed to {len(tokenizer):,} tokens. Use the tokenizer in these files."
    assert trimmed in (tmp_path / "README.md").read_text()
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert count_parameters(small) <= 0.7 * trainer.vocabulary_plan.parameters["after"] < 0.7 * dense
    torch.testing.assert_close(logits(small, again, UNSEEN), logits(trainer.model.eval(), tokenizer, UNSEEN))


def test_several_evaluation_sets_keep_their_format(tmp_path):
    model, tokenizer, rows = parts()
    sets = {"a": tokenized(tokenizer, SEEN).with_format("torch"), "b": tokenized(tokenizer, UNSEEN)}
    trainer = make(tmp_path, model, tokenizer, rows, eval_dataset=sets)
    assert list(trainer.eval_dataset) == ["a", "b"] and trainer.eval_dataset["a"].format["type"] == "torch"
    expected = tokenizer(SEEN[0])["input_ids"]
    assert trainer.eval_dataset["a"][0]["input_ids"].tolist() == expected


CASES = {
    "no tokenizer": ({"tokenizer": None}, "Pass processing_class=tokenizer"),
    "another collator": ({"data_collator": "other"}, "data_collator has another one"),
    "a list": ({"rows": "list"}, "train_dataset is a list"),
    "texts": ({"rows": "texts"}, "train_dataset is a Dataset of text, label"),
    "a model_init": ({"model_init": "made"}, "model_init would not fit"),
    "a teacher": ({"teacher": "copied"}, "a teacher would not fit"),
    "an optimizer": ({"optimizers": "made"}, "optimizers would not fit"),
    "a language model": ({"task": "ForMaskedLM"}, "but BertForMaskedLM predicts some"),
    "another size": ({"more": -1}, "the tokenizer is another model's"),
    "other ids": ({"rows": "beyond"}, "The texts have the ids .9999., but"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_before_anything_changes(tmp_path, case):
    change, message = CASES[case]
    model, tokenizer, rows = parts(change.get("task", "ForSequenceClassification"))
    given = {}
    if "more" in change:
        model = model_for(tokenizer, task="ForSequenceClassification", more=-1)
    if change.get("rows") == "list":
        rows = [dict(row) for row in rows]
    if change.get("rows") == "texts":
        rows = Dataset.from_dict({"text": SEEN, "label": [0, 1, 0]})
    if change.get("rows") == "beyond":
        rows = Dataset.from_dict({"input_ids": [[9999]], "label": [0]})
    if "data_collator" in change:
        given["data_collator"] = DataCollatorWithPadding(copy.deepcopy(tokenizer))
    if "model_init" in change:
        given["model_init"] = lambda: model
    if "teacher" in change:
        given["teacher"] = copy.deepcopy(model)
    if "optimizers" in change:
        given["optimizers"] = (torch.optim.SGD(model.parameters(), 0.1), None)
    before, size = copy.deepcopy(model.state_dict()), len(tokenizer)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model, None if "tokenizer" in change else tokenizer, rows, **given)
    assert len(tokenizer) == size
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_evaluation_set_may_have_any_name(tmp_path):
    model, tokenizer, rows = parts()
    held_out = {"train_dataset": tokenized(tokenizer, UNSEEN[:1])}
    trainer = make(tmp_path, model, tokenizer, rows, eval_dataset=held_out)
    assert len(trainer.train_dataset) == len(rows)
    expected = tokenized(tokenizer, UNSEEN[:1])["input_ids"]
    assert trainer.eval_dataset["train_dataset"]["input_ids"] == expected


@pytest.mark.parametrize(
    ("ids", "message"), [([], "train_dataset has no rows"), ([[[1, 2], [3]]], "a list of whole numbers a row")]
)
def test_rows_without_a_list_of_ids_are_named(tmp_path, ids, message):
    model, tokenizer, _ = parts()
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model, tokenizer, Dataset.from_dict({"input_ids": ids, "label": [0] * len(ids)}))


def test_a_configuration_that_does_not_ask_for_it_changes_nothing(tmp_path):
    model, tokenizer, rows = parts()
    size = len(tokenizer)
    trainer = make(tmp_path, model, tokenizer, rows, dataclasses.replace(CONFIG, trim_vocabulary=False))
    assert len(tokenizer) == size and trainer.vocabulary_plan is None and trainer.train_dataset is rows
