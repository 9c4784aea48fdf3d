"""The notebooks, run whole on small settings: `pytest -m notebook`."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "quickstart": {"train_examples": 128, "validation_examples": 64},
    "sensitivity": {"train_examples": 128, "scored_examples": 64, "probe_examples": 32},
    "glue_study": {},
}


def test_every_notebook_is_run():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_are_committed_without_outputs(name):
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.notebook
@pytest.mark.parametrize("name", SMALL)
def test_notebook(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    known = {line.partition(" = ")[0] for cell in parameters for line in cell.source.splitlines()}
    assert set(SMALL[name]) <= known
    for cell in parameters:
        cell.source += "".join(f"\n{key} = {value}" for key, value in SMALL[name].items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
