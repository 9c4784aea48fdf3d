"""Dimensions of heads on the command line: aligned by `hap prune`, or step by step."""

import json
import shutil

import pytest
import torch
from encoders import TEXTS, save_encoder
from sentence_transformers import SentenceTransformer
from tiny import DIMENSIONS
from typer.testing import CliRunner

from hap_transformers import PruningPlan, Sensitivity
from hap_transformers.cli import app
from hap_transformers.reporting.eval_results import write_eval_results
from hap_transformers.reporting.ranks import head_ranks


WRITTEN = {"README.md", "pruning_plan.json", "report.html", "results.json", "sensitivity.safetensors"}
PICTURES = {"head_ranks.png", "structure.png"}
KINDS = [word for kind in DIMENSIONS for word in ("--components", kind)]


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    return save_encoder(tmp_path)


def hap(*arguments, error=None):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert (result.exit_code == 0) == (error is None), result.output
    if error is not None:
        assert error in " ".join(str(result.exception).split())
    return result


def embedded(folder):
    return torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_one_command(source, tmp_path, drawn):
    hap("prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small")
    small = SentenceTransformer("small", device="cpu")[0].auto_model
    plan, scores = PruningPlan.load("small/pruning_plan.json"), Sensitivity.load("small/sensitivity.safetensors")
    assert plan.basis == scores.basis == small.config.aligned_heads and set(scores.scores) == set(DIMENSIONS)
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert results["head_ranks"] == head_ranks(small) and results["hap_config"]["components"] is None
    # A number a head in the record, in `hap info`, on the page and on the card.
    left = {kind: list(small.config.quantization_config[kind].values()) for kind in DIMENSIONS[:2]}
    info = json.loads(hap("info", "small", "--length", 8, "--json").stdout)
    assert {kind: info[kind] for kind in left} == left == results["head_ranks"] and info["dense_head_dims"] == 4
    row = hap("info", "small", "--length", 8).stdout.splitlines()[2].split()
    assert row[1:9] == [*map(str, left["query_key_dims"][0]), *map(str, left["value_dims"][0])]
    page, card = ((tmp_path / "small" / name).read_text() for name in ("report.html", "README.md"))
    assert "Dimensions left in each head" in page and page.count(">query/key dimensions: layer<") == 1
    total = sum(map(sum, left["value_dims"]))
    assert f"{total} of 32 value dimensions and " in card and "![Dimensions left in each head](head_ranks.png)" in card
    assert (tmp_path / "small" / "head_ranks.png").read_bytes().startswith(b"\x89PNG")


def test_step_by_step(source):
    before = embedded(source)
    hap("align", source, "--texts", "texts.txt", "--output", "aligned")
    torch.testing.assert_close(embedded("aligned"), before, rtol=1e-4, atol=1e-5)
    scored = hap("score", "aligned", "--texts", "texts.txt")
    assert "not aligned" not in scored.stderr and set(Sensitivity.load("sensitivity.safetensors").scores) == set(
        DIMENSIONS
    )
    planned = hap("plan", "sensitivity.safetensors", "--ratio", 0.5, "--no-check-latency").stdout
    assert "query_key_dims" in planned and "value_dims removed" in planned
    hap("prune", source, "--plan", "plan.json", "--output", "no", error="whose dimensions are others")
    hap("prune", "aligned", "--plan", "plan.json", "--texts", "texts.txt", "--output", "small")
    assert torch.nn.functional.cosine_similarity(embedded("small"), before).mean() > 0.5


def test_scores_of_heads_that_were_not_aligned(source):
    """Whole heads are scored by default; dimensions on demand, with a warning."""
    hap("score", source, "--texts", "texts.txt")
    assert set(Sensitivity.load("sensitivity.safetensors").scores) == {"heads", "neurons"}
    told = hap("score", source, "--texts", "texts.txt", *KINDS).stderr
    assert "were not aligned: the costs" in told and "Run `hap align` first" in told


@pytest.mark.parametrize(
    "more, error",
    [
        (["--components", "columns"], "must name some of"),
        (["--components", "heads", "--components", "value_dims"], "remove either, not both"),
        ([*KINDS, "--budget", "latency", "--no-even-heads"], "plans for query_key_dims and value_dims together"),
        ([*KINDS, "--method", "fisher"], "cannot score query_key_dims"),
        ([*KINDS, "--min-heads", "1"], "min_heads is a floor of whole heads"),
    ],
)
def test_kinds_that_do_not_suit(source, tmp_path, more, error):
    hap("prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small", *more, error=error)
    assert not (tmp_path / "small").exists()


def test_a_model_that_lost_dimensions(source):
    hap("prune", source, "--texts", "texts.txt", "--ratio", 0.4, "--output", "small")
    again = ("prune", "small", "--texts", "texts.txt", "--ratio", 0.6, "--output", "smaller")
    hap(*again, "--components", "heads", error="have lost dimensions and no longer go whole")
    hap(*again)
    left = [sum(p.numel() for p in SentenceTransformer(n, device="cpu").parameters()) for n in ("small", "smaller")]
    assert left[1] < left[0]


@pytest.mark.parametrize("command", ["align", "prune"])
def test_nothing_tells_of_an_earlier_model_where_a_dense_one_takes_its_place(source, tmp_path, command):
    hap("prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small")
    assert {file.name for file in (tmp_path / "small").iterdir()} >= WRITTEN | PICTURES
    write_eval_results("small", {"accuracy": 0.9}, "glue", "sst2")
    shutil.copytree("small", "own")
    kept = tmp_path / "own" / "README.md"
    kept.write_text("Somebody wrote this.")
    for folder in ("small", "own"):
        ratio = ["--ratio", 0] if command == "prune" else []
        hap(command, source, "--texts", "texts.txt", *ratio, "--output", folder, "--overwrite")
        left = {file.name for file in (tmp_path / folder).iterdir()} & (WRITTEN | PICTURES)
        left -= PICTURES if folder == "own" else set()  # Somebody's card may show them.
        plan = {"pruning_plan.json"} if command == "prune" else set()
        assert left - {"README.md"} == plan
        torch.testing.assert_close(embedded(folder), embedded(source), rtol=1e-4, atol=1e-5)
    card = tmp_path / "small" / "README.md"
    assert not card.exists() or "Written by hap_transformers" not in card.read_text()
    assert kept.read_text() == "Somebody wrote this." and not list((tmp_path / "small").glob(".eval_results/*"))
