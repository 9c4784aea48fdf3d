"""Labels are numbered as the checkpoint numbers them, by name."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import make_model
from transformers import BertConfig

from hap_transformers.tasks import Task


def task(*names, rows=6):
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    columns = {"text": [f"text {i}" for i in range(rows)], "label": [i % len(names) for i in range(rows)]}
    split = Dataset.from_dict(columns, features=features)
    return Task("custom", DatasetDict(train=split, validation=split), ("text",), list(names))


def config(*names, architecture="BertForSequenceClassification", **settings):
    if names:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return BertConfig(architectures=architecture and [architecture], name_or_path="me/model", **settings)


def by_name(given):
    return {
        split: {row["text"]: given.labels[row["label"]].lower() for row in given.data[split]} for split in given.data
    }


@pytest.mark.parametrize("names", [("positive", "negative"), ("POSITIVE", "Negative")])
def test_another_order(names):
    given = task("negative", "positive")
    aligned = given.aligned_with(config(*names))
    assert aligned.labels == list(names) and aligned.data["train"].features["label"].names == list(names)
    assert by_name(aligned) == by_name(given) and aligned.data["train"]["label"][:2] == [1, 0]
    assert given.data["train"]["label"][:2] == [0, 1]  # The task itself stays as it was.


@pytest.mark.parametrize("names", [("a", "A"), ("pos ", "pos")])
def test_names_that_differ_in_little_are_compared_exactly_first(names):
    given = task(*reversed(names))
    aligned = given.aligned_with(config(*names))
    assert aligned.labels == list(names) and aligned.data["train"]["label"][:2] == [1, 0]


def test_spaces_around_names():
    aligned = task(" neg", "pos ").aligned_with(config("Pos", "Neg"))
    assert aligned.labels == ["Pos", "Neg"] and aligned.data["train"]["label"][:2] == [1, 0]


def test_three_classes_and_names_of_outputs_alone():
    given, default = task("contradiction", "entailment", "neutral"), {i: f"LABEL_{i}" for i in range(3)}
    for model in (
        config("ENTAILMENT", "NEUTRAL", "CONTRADICTION"),
        config(id2label=default, label2id={"entailment": 0, "neutral": 1, "contradiction": 2}),
    ):
        aligned = given.aligned_with(model)
        assert [name.lower() for name in aligned.labels] == ["entailment", "neutral", "contradiction"]
        assert by_name(aligned) == by_name(given)


def test_default_names_as_labels_of_the_data():
    """Files of predictions hold the default names, and sorting puts LABEL_10 before LABEL_2."""
    names = [f"LABEL_{i}" for i in range(11)]
    aligned = task(*sorted(names)).aligned_with(config(num_labels=11))
    assert aligned.labels == names


@pytest.mark.parametrize(
    "model",
    [config("no", "yes"), config("NO", "Yes"), config(num_labels=2), config(num_labels=2, architecture="BertModel")],
    ids=["same", "spelled otherwise", "default", "encoder"],
)
def test_nothing_to_do(model, caplog):
    given = task("no", "yes")
    assert given.aligned_with(model) is given and not caplog.records


def test_other_names_are_reported(caplog):
    given = task("no", "yes")
    assert given.aligned_with(config("dull", "fun")) is given
    (record,) = caplog.records
    assert "'me/model' names the classes dull, fun, task 'custom' names no, yes" in record.getMessage()


@pytest.mark.parametrize(
    "model, message",
    [
        (config("a", "b", "c"), r"'me/model' has 3 outputs \(a, b, c\), task 'custom' needs 2 \(no, yes\)"),
        (config(num_labels=5), r"'me/model' has 5 outputs, task 'custom' needs 2"),
        (config(num_labels=1), r"has 1 outputs, .*Write ratings as floating point numbers \(1.0\)"),
        (config("a", "b", "c", architecture=None), "has 3 outputs"),
    ],
)
def test_another_number(model, message):
    given = task("no", "yes")
    with pytest.raises(ValueError, match=message + ".*--ignore_mismatched_sizes"):
        given.aligned_with(model)
    assert given.aligned_with(model, ignore_mismatched_sizes=True) is given


def test_an_encoder_gets_any_number():
    given = task("a", "b", "c")
    for architecture in ("BertModel", "BertForMaskedLM"):
        assert given.aligned_with(config("x", "y", architecture=architecture)) is given
    assert given.aligned_with(config(num_labels=2, architecture=None)) is given


def test_regressions():
    given = Task("stsb", None, ("text",), None)
    assert given.aligned_with(config(num_labels=1)) is given
    with pytest.raises(ValueError, match=r"has 2 outputs \(a, b\), task 'stsb' needs 1 \(a regression\)"):
        given.aligned_with(config("a", "b"))


def test_configs_of_the_zoo(model_type):
    """Whatever the architecture's config, its default names are none."""
    model = make_model(model_type)
    given = task("no", "yes")
    assert given.aligned_with(model.config) is given
