"""Custom files as users have them: other encodings, ragged rows, formats that differ, labels that mean the same."""

import csv
import json

import pytest
from script_inputs import ROWS, write_csv

from hap_transformers.tasks import load_task


def load(train, validation=None, **settings):
    return load_task(train_file=str(train), validation_file=str(validation or train), **settings)


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def labels(task, split):
    """The labels of a split by name, or the values of a regression."""
    values = task.data[split]["label"]
    return list(values) if task.labels is None else [task.labels[i] for i in values]


FRENCH = [("café médiocre", "no"), ("très bien", "yes")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_other_encodings_need_a_flag(tmp_path, encoding, ending):
    file = tmp_path / f"rows.{ending}"
    text = write_csv(tmp_path / "utf8.csv", FRENCH)
    if ending == "jsonl":
        rows = [json.dumps({"sentence": text, "label": label}, ensure_ascii=False) for text, label in FRENCH]
        file.write_text("\n".join(rows), encoding=encoding)
    else:
        file.write_text((tmp_path / "utf8.csv").read_text(), encoding=encoding)
    with pytest.raises(ValueError, match=rf"rows.{ending}' is not UTF-8: .*( in line \d+|of UTF-16). Pass"):
        load(file)
    task = load(file, text, encoding=encoding)  # A file that is UTF-8 is read as such.
    assert list(task.data["train"]["sentence"]) == list(task.data["validation"]["sentence"]) == [t for t, _ in FRENCH]


def test_wrong_encodings(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\ncafé,a\nb,b\n", encoding="latin-1")
    with pytest.raises(ValueError, match="Python knows no encoding 'latin-nope'"):
        load(file, encoding="latin-nope")
    with pytest.raises(ValueError, match="rows.csv' is not ascii: .* Pass another --encoding"):
        load(file, encoding="ascii")
    with pytest.raises(ValueError, match="--encoding is that of --train_file"):
        load_task("mrpc", encoding="latin-1")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("label,text\na,x y\nb,y z\n", encoding="utf-8-sig")
    assert load(file).labels == ["a", "b"]
    write_jsonl(tmp_path / "plain.jsonl", [{"label": c, "text": c} for c in "ab"])
    file = tmp_path / "rows.jsonl"
    file.write_text((tmp_path / "plain.jsonl").read_text(), encoding="utf-8-sig")
    assert load(file).labels == ["a", "b"]


@pytest.mark.parametrize(
    "row, fields", [("bad, dull,no", 3), ("dull", 1), ("a,b,c,d", 4)], ids=["comma", "no label", "many"]
)
def test_ragged_rows(tmp_path, row, fields):
    file = tmp_path / "rows.csv"
    file.write_text(f"text,label\ngood,yes\n{row}\nbad,no\n")
    with pytest.raises(ValueError, match=rf"rows.csv' has {fields} fields in row 2 \(line 3\) and 2 in its header"):
        load(file)


def test_commas_in_every_text_are_no_index(tmp_path):
    """Pandas reads the first field as a row's name if all rows have a field more than the header."""
    file = tmp_path / "rows.csv"
    file.write_text("text,label\ngood, fun,yes\nbad, dull,no\n")
    with pytest.raises(ValueError, match="3 fields in row 1"):
        load(file)


def test_quoted_texts(tmp_path):
    texts = ['said "well, no"', "two\nlines", "x" * 200_000, "café"]
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["text", "label"], *([text, i % 2] for i, text in enumerate(texts))])
    task = load(file)
    assert list(task.data["train"]["text"]) == texts and csv.field_size_limit() == 131072


def test_words_that_pandas_takes_for_missing(tmp_path):
    rows = [("null", "None"), ("NA", "n/a"), ("nan", "inf")]
    task = load(write_csv(tmp_path / "rows.csv", rows))
    assert list(task.data["train"]["sentence"]) == [text for text, _ in rows] and labels(task, "train") == [
        "None",
        "n/a",
        "inf",
    ]


def test_texts_of_digits_stay_as_they_are(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("007", "a"), ("good", "b")])
    validation = write_csv(tmp_path / "validation.csv", [("007", "a"), ("1.50", "b")])
    assert list(load(train, validation).data["validation"]["sentence"]) == ["007", "1.50"]


def test_columns_of_numbers_are_no_texts(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("idx,score,flag,text,label\n1,0.5,true,good,a\n2,1e-3,False,bad,b\n")
    assert load(file).texts == ("text",)
    file.write_text("text,text,label\na,b,c\n")
    with pytest.raises(ValueError, match="names the column 'text' more than once"):
        load(file)


@pytest.mark.parametrize("content", ["", "text,label\n", "[]"])
def test_files_without_rows(tmp_path, content):
    file = tmp_path / ("rows.json" if content == "[]" else "rows.csv")
    file.write_text(content)
    with pytest.raises(ValueError, match="has no rows"):
        load(file)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a", "label": "b"}\n{"text": "a", ', "in row 2: Expecting"),
        ('{"text": "a", "label": "b"}\n["a", "b"]', r"has \[\"a\", \"b\"\] in row 2 where an object"),
        ('[{"text": "a", "label": "b"}, 3]', "has 3 in row 2 where an object"),
        ('{\n"data": [{"text": "a", "label": "b"}]\n}', "in row 1: .* Expected one object a line"),
        ('{"text": "a", "label": "b"}\n{"text": "c"}', "has no label in row 2"),
    ],
    ids=["cut", "list", "number", "nested", "missing"],
)
def test_wrong_json(tmp_path, content, message):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(file)


@pytest.mark.parametrize("written", [[1, 0], ["1", "0"], [1.0, 0.0]], ids=["numbers", "words", "with a point"])
def test_csv_beside_jsonl(tmp_path, written):
    """Number and word of the same name are the same class; a list of objects may end in .json."""
    train = write_csv(tmp_path / "train.csv", [("good", 1), ("bad", 0), ("film", 10)])
    validation = tmp_path / "validation.json"
    validation.write_text(json.dumps([{"sentence": "a", "label": label} for label in written]))
    task = load(train, validation)
    assert task.labels == ["0", "1", "10"] and labels(task, "validation") == ["1", "0"]
    if written != [1.0, 0.0]:  # A training file with floating point numbers is a regression.
        write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": label} for label in written])
        other = load(tmp_path / "train.jsonl", write_csv(tmp_path / "v.csv", [("good", 1), ("bad", 0)]))
        assert labels(other, "validation") == ["1", "0"]


def test_truth_values_in_csv_and_json(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("good", "true"), ("bad", "false")])
    for written in ([True, False], ["true", "false"]):
        rows = [{"sentence": "a", "label": label} for label in written]
        task = load(train, write_jsonl(tmp_path / "validation.jsonl", rows))
        assert labels(task, "validation") == ["True", "False"]


def test_regression_with_whole_numbers_or_words_beside(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("good", 1.5), ("bad", 2)])
    for written in ([3, 4], ["3", "4.0"]):
        rows = [{"sentence": "a", "label": label} for label in written]
        assert labels(load(train, write_jsonl(tmp_path / "v.jsonl", rows)), "validation") == [3.0, 4.0]
    rows = [{"sentence": "a", "label": "much"}]
    with pytest.raises(ValueError, match="v.jsonl' has the label 'much' in row 1; the training labels are floating"):
        load(train, write_jsonl(tmp_path / "v.jsonl", rows))


def test_validation_without_a_text_column(tmp_path):
    train = write_csv(tmp_path / "train.csv", ROWS)
    rows = [{"text": "a", "label": "yes"}]
    with pytest.raises(ValueError, match=r"v.jsonl' has columns \['text', 'label'\]; it lacks sentence"):
        load(train, write_jsonl(tmp_path / "v.jsonl", rows))


def test_a_single_class(tmp_path):
    with pytest.raises(ValueError, match="has the label 'yes' alone; a classifier needs two"):
        load(write_csv(tmp_path / "rows.csv", [("good", "yes")] * 3))


def test_other_endings(tmp_path):
    file = write_csv(tmp_path / "rows.txt", ROWS)
    with pytest.raises(ValueError, match="rows.txt' is neither CSV nor JSON"):
        load(write_csv(tmp_path / "rows.csv", ROWS), file)
    assert load(write_csv(tmp_path / "ROWS.CSV", ROWS)).labels == ["no", "yes"]


def test_the_byte_order_mark_is_named(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\ncafé,a\nb,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match="byte order mark of UTF-16. Pass --encoding utf-16"):
        load_task(train_file=str(file), validation_file=str(file))


def test_a_repeated_header_is_no_class(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,x\nb,y\ntext, label\nc,x\n")
    with pytest.raises(ValueError, match=r"repeats its header in row 3 \(line 4\)"):
        load_task(train_file=str(file), validation_file=str(file))


@pytest.mark.parametrize("value", ['["a", "word"]', "3"])
def test_columns_without_texts_are_named(tmp_path, value):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"sentence": {value}, "label": {i}}}\n' for i in range(2)))
    with pytest.raises(ValueError, match="has no texts: its columns sentence hold numbers, lists or objects"):
        load_task(train_file=str(file), validation_file=str(file))
