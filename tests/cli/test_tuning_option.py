"""`hap prune --tuning-epochs`: layers are trained one by one after the refit."""

import json

import pytest
import torch
from encoders import TEXTS, save_encoder, save_transformer
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import AutoTokenizer
from typer.testing import CliRunner
from zoo import ZOO

from hap_transformers import PruningPlan
from hap_transformers.cli import app


WHOLE = ("--components", "heads", "--components", "neurons")


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embedded(folder):
    return torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS, show_progress_bar=False))


def test_layers_are_tuned_on_demand(here):
    source = save_encoder(here)
    command = ("prune", source, "--texts", "texts.txt", "--ratio", 0.5, *WHOLE, "--length", 12)
    for more in (("--output", "plain"), ("--output", "tuned", "--tuning-epochs", 30)):
        CliRunner().invoke(app, [*map(str, (*command, *more))], catch_exceptions=False)
    assert not torch.equal(embedded("tuned"), embedded("plain"))
    wanted = embedded(source)
    cosines = [F.cosine_similarity(embedded(folder), wanted).mean() for folder in ("plain", "tuned")]
    assert cosines[1] > cosines[0]
    assert json.loads((here / "tuned" / "results.json").read_text())["hap_config"]["tuning_epochs"] == 30


def test_a_model_that_cannot_be_tuned_is_named_before_the_work(here):
    ZOO["albert"].model(torch.float32).save_pretrained("albert")
    AutoTokenizer.from_pretrained(save_transformer(here)).save_pretrained("albert")
    command = ("prune", "albert", "--texts", "texts.txt", "--ratio", "0.5", "--output", "out", "--tuning-epochs", "1")
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code and "share their weights and cannot be tuned" in str(result.exception or result.output)
    assert not (here / "out").exists()


@pytest.mark.parametrize("road", ["plan", "ratio"])
def test_tuning_without_examples_is_named(here, road):
    """Neither road needs any examples otherwise."""
    source = save_encoder(here)
    model = SentenceTransformer(str(source), device="cpu")[0].auto_model
    PruningPlan.for_model(model, heads={0: [0]}).save(here / "plan.json")
    given = ("--plan", "plan.json") if road == "plan" else ("--ratio", "0.5", "--method", "magnitude", *WHOLE)
    command = ("prune", str(source), *given, "--output", "out", "--tuning-epochs", "1")
    result = CliRunner().invoke(app, command)
    assert result.exit_code and not (here / "out").exists()
    assert "--texts" in f"{result.output}{result.exception}"
    assert CliRunner().invoke(app, command[:-2]).exit_code == 0
