"""Plain texts are read from lines and tables; what is no text is named."""

import gzip
import io

import pytest
from datasets import Dataset

from hap_transformers.data.texts import read_texts


TEXTS = [f"sentence number {i}" for i in range(9)]


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def test_every_form_gives_the_same_texts(tmp_path, monkeypatch):
    lines = "\n".join(TEXTS)
    table = {"text": TEXTS, "number": list(range(9))}
    Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict(table).to_csv(tmp_path / "a.csv")
    Dataset.from_dict(table).to_json(tmp_path / "a.jsonl")
    Dataset.from_dict({"number": ["a", "b", *"cdefghi"], "text": TEXTS}).to_parquet(tmp_path / "b.parquet")
    assert read_texts([written(tmp_path, "a.txt", lines)]) == TEXTS
    assert read_texts([written(tmp_path, "a.md", "\n\n" + lines.replace("\n", "\r\n\r\n"))]) == TEXTS
    for name in ("a.parquet", "a.jsonl", "a.csv"):  # Numbers are no words, nor are those of CSV files.
        assert read_texts([str(tmp_path / name)]) == TEXTS
    assert read_texts([str(tmp_path / "b.parquet")], columns=["text"]) == TEXTS
    with pytest.raises(ValueError, match="b.parquet' has the columns .* Name the one of the texts by --column"):
        read_texts([str(tmp_path / "b.parquet")])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert read_texts(["-"]) == TEXTS


def test_only_ends_of_lines_end_texts(tmp_path):
    lines = ["one\u2028text", "with\x0cform feed", "wait\x85 and see", *TEXTS]
    for end in ("\n", "\r\n", "\r"):
        assert read_texts([written(tmp_path, "a.txt", end.join(lines) + end)]) == lines


def test_several_files_are_one_list_without_repetitions(tmp_path):
    first = written(tmp_path, "a.txt", "\n".join(TEXTS[:6]))
    second = written(tmp_path, "b.txt", "\n".join([" " + TEXTS[0], "", *TEXTS[5:], TEXTS[3]]))
    assert read_texts([first, second]) == TEXTS


def test_other_encodings(tmp_path):
    file = written(tmp_path, "a.txt", "\n".join(text + " é" for text in TEXTS).encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xe9 in line 1.*--encoding latin-1"):
        read_texts([file])
    assert read_texts([file], encoding="latin-1") == [text + " é" for text in TEXTS]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", r"'.*a.txt': 0 different texts in 0 lines. Give at least 8"),
        ("a.txt", "\n \n", "0 different texts in 2 lines"),
        ("a.txt", "one line", "1 different texts in 1 lines"),
        ("a.txt", "the same\n" * 100, "1 different texts in 100 lines"),
        ("a.txt", b"PNG\0\0\1" * 20, "a.txt' is no text: it has null characters"),
        ("a.txt.gz", gzip.compress(b"one line", mtime=0), "a.txt.gz' is compressed; unpack it"),
        ("a.csv", gzip.compress(b"text", mtime=0), "a.csv' is compressed; unpack it"),
        ("a.csv", "text;label\n" + "\n".join(f"t{i};{i}" for i in range(9)), "a.csv' separates its columns by ';'"),
        ("a.csv", "text\tlabel\n" + "\n".join(f"t{i}\t{i}" for i in range(9)), "by '\\\\t', not by commas"),
        ("A.TSV", "text\tlabel\n" + "\n".join(f"t{i}\t{i}" for i in range(9)), "A.TSV' is a table; save it as .csv"),
        ("a.parquet", b"PAR1 rubbish", "a.parquet' cannot be read as Parquet"),
        (
            "a.csv",
            "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(9)),
            "columns text, label, of which text, label",
        ),
        ("a.jsonl", '{"number": 1}\n' * 9, "columns number, of which none hold words"),
        (
            "a.jsonl",
            '{"text": "a"}\n' * 9 + '{"text": 1}',
            "column 'text' of '.*a.jsonl' has 1 where a text is expected",
        ),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_texts([written(tmp_path, name, content)])


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file 'no.txt'"):
        read_texts(["no.txt"])
    file = written(tmp_path, "a.jsonl", '{"text": "a"}\n' * 9)
    with pytest.raises(ValueError, match="has no column 'sentence'; it has text"):
        read_texts([file], columns=["sentence"])
