"""The embedded demo's sentences."""

import pytest

from hap_transformers.data.demo import load_demo_dataset


def test_demo_file_with_another_checksum(tmp_path):
    (tmp_path / "wrong.tar.gz").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="SHA-256.*expected 5d7c06e0"):
        load_demo_dataset(tmp_path / "wrong.tar.gz")


def test_demo_dataset():
    data = load_demo_dataset()
    sizes = {split: len(rows) for split, rows in data.items()}
    assert sizes["validation"] == round(0.1 * sum(sizes.values())) and sum(sizes.values()) <= 10605
    assert not set(data["train"]["idx"]) & set(data["validation"]["idx"])
    first = dict(zip(data["train"]["idx"], data["train"]["label"], strict=True))
    first.update(zip(data["validation"]["idx"], data["validation"]["label"], strict=True))
    assert (first[1], first[2], first[3]) == (1, 1, 0)
