"""Files are written whole or not at all."""

import os

import pytest

from hap_transformers.files import whole_file, whole_files, write_text


def test_what_fails_halfway_leaves_the_file_from_before(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), whole_file(path) as unfinished:
        unfinished.write_text("half")
        assert unfinished.suffix == ".txt" and path.read_text() == "before"
        raise RuntimeError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_files_of_a_folder_come_together_and_the_config_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    with whole_files(tmp_path / "new") as unfinished:
        for name in ("config.json", "model.safetensors", "a.json"):
            (unfinished / name).write_text(name)
        assert os.listdir(tmp_path / "new") == [unfinished.name]
    assert moved == ["a.json", "model.safetensors", "config.json"] and sorted(os.listdir(tmp_path / "new")) == sorted(
        moved
    )
    with pytest.raises(RuntimeError), whole_files(tmp_path / "new") as unfinished:
        (unfinished / "config.json").write_text("other")
        raise RuntimeError
    assert (tmp_path / "new" / "config.json").read_text() == "config.json"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "taken").write_text("before")
    with pytest.raises(NotADirectoryError, match="taken' is a file; name a folder"), whole_files(tmp_path / "taken"):
        pass
