"""`hap prune --ratio`: one command from a model and texts to a smaller model, and what it says of it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from convnets import CONVNETS
from encoders import PAIRS, TEXTS, save_cross_encoder, save_encoder, save_transformer
from script_inputs import ROWS, write_csv
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)
from typer.testing import CliRunner
from zoo import ZOO

from hap_transformers import PruningPlan, Sensitivity, plan_pruning
from hap_transformers.cli import app
from hap_transformers.cli.road import estimate_sensitivity, reconstruct
from hap_transformers.data.demo import demo_model_path


WHOLE = ("--components", "heads", "--components", "neurons")
FILES = ["README.md", "pruning_plan.json", "report.html", "results.json", "sensitivity.safetensors", "structure.png"]


def hap(*arguments):
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    rows = [{"query": query, "passage": passage} for query, passage in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embedded(folder):
    return torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_a_sentence_encoder(here):
    source = save_encoder(here, dense=True)
    printed = hap("prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small", *WHOLE, "--length", 12)
    small, dense = SentenceTransformer("small", device="cpu"), SentenceTransformer(str(source), device="cpu")
    left = sum(p.numel() for p in small[0].auto_model.parameters())
    assert printed["parameters"] == {"dense": sum(p.numel() for p in dense[0].auto_model.parameters()), "pruned": left}
    assert printed["encoder_parameters"]["pruned"] <= 0.5 * printed["encoder_parameters"]["dense"]
    assert printed["refitted"] and printed["num_examples"] == {"train": 36, "validation": 4}
    assert all((here / "small" / name).is_file() for name in FILES)
    page, card = ((here / "small" / name).read_text() for name in ("report.html", "README.md"))
    assert "model = SentenceTransformer(&#34;small&#34;)" in page and "cosine of embeddings" in page
    assert "fine-tuned" not in page and "fine-tuned" not in card
    assert 'model = SentenceTransformer("PATH_OR_REPO")' in card and "library_name: sentence-transformers" in card
    scores, plan = Sensitivity.load("small/sensitivity.safetensors"), PruningPlan.load("small/pruning_plan.json")
    assert plan_pruning(scores, dense[0].auto_model, ratio=0.5) == plan
    assert printed["removed"] == {kind: plan.count(kind) for kind in plan.removed}
    assert hap("report", "small")["file"] == "small/report.html"
    assert hap("info", "small", "--length", 8)["heads"] == [4 - len(plan.heads.get(i, ())) for i in range(2)]


def test_what_is_compared_on_is_neither_scored_nor_refitted(here, monkeypatch):
    """Also the figure: the mean cosine of these texts, by the library."""
    source, seen = save_encoder(here), {"score": [], "refit": []}

    def scoring(model, batches, *arguments, **settings):
        seen["score"] = [row for batch in batches for row in batch["input_ids"].tolist()]
        return estimate_sensitivity(model, batches, *arguments, **settings)

    def refitting(model, dense, batches, **settings):
        batches = list(batches)
        seen["refit"] = [row for batch in batches for row in batch["input_ids"].tolist()]
        reconstruct(model, dense, batches, **settings)

    monkeypatch.setattr("hap_transformers.cli.road.estimate_sensitivity", scoring)
    monkeypatch.setattr("hap_transformers.cli.road.reconstruct", refitting)
    command = ["prune", source, "--texts", "texts.txt", "--ratio", 0.9, "--output", "small", "--batch", 1]
    printed = hap(*command, "--max-examples", 8, "--refit-examples", 16)
    words = {tuple(AutoTokenizer.from_pretrained(source)(text)["input_ids"]): i for i, text in enumerate(TEXTS)}
    scored, refitted = ([words[tuple(row)] for row in seen[name]] for name in ("score", "refit"))
    assert len(scored) == 8 and len(refitted) == 16 and refitted[:8] == scored
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = order[-4:]
    assert not set(held_out) & {*scored, *refitted}
    small, dense = (embedded(folder)[held_out].double() for folder in ("small", source))
    angle = 1 - float(F.cosine_similarity(small, dense).mean())
    assert 1 - printed["fidelity"]["cosine"] == pytest.approx(angle, rel=0.05) and angle > 1e-6


def test_a_classifier_says_how_its_predictions_moved(here):
    source = save_transformer(here)
    printed = hap("prune", source, "--texts", "texts.txt", "--ratio", 0.6, "--output", "small", "--seed", 3)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(3)).tolist()
    tokenizer = AutoTokenizer.from_pretrained("small")
    batch = tokenizer([TEXTS[i] for i in order[-4:]], padding=True, return_tensors="pt")
    dense, small = (
        AutoModelForSequenceClassification.from_pretrained(name)(**batch).logits.log_softmax(-1).detach()
        for name in (source, "small")
    )
    kl = (dense.exp() * (dense - small)).sum(-1).mean()
    assert printed["fidelity"]["kl"] == pytest.approx(float(kl), abs=1e-5)
    assert printed["fidelity"]["agreement"] == float((dense.argmax(-1) == small.argmax(-1)).float().mean())
    assert 'BertForSequenceClassification.from_pretrained("PATH_OR_REPO")' in (here / "small/README.md").read_text()


def test_the_table_for_people(here):
    source = save_encoder(here)
    command = ["prune", str(source), "--texts", "texts.txt", "--ratio", "0.5", "--output", "small"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    steps = [
        "aligning query/key dimensions and value dimensions",
        "scoring query/key dimensions, value dimensions and FFN neurons by kronecker on 36 examples",
    ]
    steps += ["planning to remove 50% of params", "pruning and refitting, then tuning layers"]
    steps.append("comparing with the dense model on 4 held-out examples")
    assert [f"hap: {step}" for step in steps] == result.stderr.splitlines()[:5]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][1] == "of" and lines[0][-4:] == ["refitted,", "layers", "tuned:", "small"]
    assert lines[2] == ["dense", "pruned", "left"]
    rows = {" ".join(line[:-3]) for line in lines[3:-1]}
    assert {"parameters", "of these in the encoder", "latency, one batch, ms"} <= rows
    assert any("disk" in line for line in lines) and any("FLOPs," in line for line in lines)
    assert lines[-1][:-2] == ["cosine", "of", "embeddings"] and lines[-1][-2] == "1.0000"


@pytest.mark.parametrize("form", ["plain", "library"])
def test_a_reranker(here, form):
    source = save_cross_encoder(here)
    if form == "plain":  # As releases before had it.
        for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
            (source / name).unlink()
        config = json.loads((source / "config.json").read_text())
        config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "4.0.0"}
        (source / "config.json").write_text(json.dumps(config))
    command = ["prune", source, "--texts", "pairs.jsonl", "--ratio", 0.4, "--output", "small"]
    with pytest.raises(ValueError, match="is a cross-encoder, which reads pairs of texts. Name the two columns"):
        hap(*command, "--column", "query")
    printed = hap(*command, "--column", "query", "--column", "passage")
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [PAIRS[i] for i in order[-4:]]
    dense, small = (
        torch.from_numpy(CrossEncoder(str(name), device="cpu").predict(pairs, activation_fn=torch.nn.Identity()))
        for name in (source, "small")
    )
    error = (dense - small).square().mean().sqrt() / dense.std(unbiased=False)
    assert printed["fidelity"]["relative_error"] == pytest.approx(float(error), rel=1e-3)
    assert printed["fidelity"]["correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([dense, small]))[0, 1])
    )
    assert (here / "small" / "modules.json").exists() == (form == "library")
    assert 'model = CrossEncoder("PATH_OR_REPO")' in (here / "small" / "README.md").read_text()


def test_a_language_model(here):
    tokenizer = AutoTokenizer.from_pretrained(save_transformer(here))
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    printed = hap("prune", "lm", "--texts", "texts.txt", "--ratio", 0.5, "--output", "small", "--length", 16)
    assert set(printed["fidelity"]) == {"agreement", "kl"} and 0 < printed["fidelity"]["agreement"] <= 1
    small = AutoModelForCausalLM.from_pretrained("small")
    assert sum(p.numel() for p in small.parameters()) == printed["parameters"]["pruned"]


def test_labels_are_read_where_they_are_asked_for(here):
    """And the task's metrics of either model are measured on the held-out rows."""
    source, train = save_transformer(here), write_csv(here / "train.csv", ROWS)
    printed = hap("prune", source, "--train-file", train, "--ratio", 0.5, "--output", "small", "--length", 8)
    held_out = [ROWS[i] for i in torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()[-3:]]
    tokenizer = AutoTokenizer.from_pretrained("small")
    batch = tokenizer([text for text, _ in held_out], padding=True, return_tensors="pt")
    for phase, name in (("dense", source), ("pruned", "small")):
        found = AutoModelForSequenceClassification.from_pretrained(name)(**batch).logits.argmax(-1)
        right = [["no", "yes"][i] == label for i, (_, label) in zip(found, held_out, strict=True)]
        assert printed["metrics"][phase]["accuracy"] == pytest.approx(sum(right) / 3)
    results = json.loads((here / "small" / "results.json").read_text())
    assert results["task"] == "custom" and "3 validation examples" in (here / "small" / "report.html").read_text()


def test_standard_input(here):
    command = ["prune", str(save_encoder(here)), "--texts", "-", "--ratio", "0.5", "--output", "small", "--json"]
    printed = CliRunner().invoke(app, command, input="\n".join(TEXTS))
    assert printed.exit_code == 0 and json.loads(printed.stdout)["num_examples"]["train"] == 36


def test_settings_reach_their_step(here):
    source = save_encoder(here)
    command = ["prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small"]
    settings = ["--method", "fisher", "--budget", "flops", "--min-heads", 2, "--neuron-multiple", 4]
    printed = hap(*command, *settings, "--max-memory", "1GB", "--max-examples", 10)
    plan = PruningPlan.load("small/pruning_plan.json")
    assert (plan.method, plan.budget, plan.ratio) == ("fisher", "flops", 0.5) and "flops" in plan.promise
    assert Sensitivity.load("small/sensitivity.safetensors").num_examples == 10
    assert all(count >= 2 for count in hap("info", "small", "--length", 8)["heads"])
    assert printed["flops"]["pruned"] < printed["flops"]["dense"]
    kept = json.loads((here / "small" / "results.json").read_text())["hap_config"]
    assert {"min_heads": 2, "method": "fisher", "max_memory": "1GB", "max_examples": 10}.items() <= kept.items()


def test_methods_without_examples_need_no_texts(here):
    printed = hap("prune", save_encoder(here), "--method", "magnitude", "--ratio", 0.5, "--output", "small")
    assert not printed["refitted"] and "fidelity" not in printed
    assert embedded("small").shape == (len(TEXTS), 16)


def test_a_model_that_meets_the_ratio_is_copied(here):
    source = save_encoder(here)
    result = CliRunner().invoke(
        app,
        ["prune", str(source), "--texts", "texts.txt", "--ratio", "0", "--output", "small"],
        catch_exceptions=False,
    )
    assert "Nothing to remove: the model meets params 0% already" in result.stdout
    assert "the model was copied unchanged: small" in result.stdout
    assert torch.equal(embedded("small"), embedded(source))


def test_a_plan_is_the_other_road(here):
    source = save_encoder(here)
    hap("score", source, "--texts", "texts.txt", "--output", "scores")
    assert Sensitivity.load("scores").model == str(source)
    hap("plan", "scores", "--ratio", 0.5, "--output", "plan.json")
    command = ["prune", source, "--plan", "plan.json", "--output", "small"]
    assert hap(*command, "--texts", "texts.txt")["refitted"]
    refitted = embedded("small")
    assert not hap(*command, "--overwrite")["refitted"]
    distances = [(embedded("small") - embedded(source)).norm(), (refitted - embedded(source)).norm()]
    assert distances[1] < distances[0]
    assert not (here / "small" / "report.html").exists()
    bench = hap("bench", source, "small", "--length", 8, "--repeats", 1)
    assert bench["parameters"]["pruned"] < bench["parameters"]["dense"]


def test_a_page_of_an_earlier_model_is_removed(here):
    source = save_encoder(here)
    hap("prune", source, "--texts", "texts.txt", "--ratio", 0.5, "--output", "small", *WHOLE)
    hap("prune", source, "--plan", "small/pruning_plan.json", "--output", "small", "--overwrite")
    assert not (here / "small" / "report.html").exists() and (here / "small" / "README.md").exists()


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_results_of_something_else_are_not_replaced(here, name):
    (here / "small").mkdir()
    (here / "small" / name).write_text("mine")
    with pytest.raises(ValueError, match="'small' holds results of a run. Choose another folder, or pass --overwrite"):
        hap("prune", save_encoder(here), "--texts", "texts.txt", "--ratio", 0.5, "--output", "small")
    assert (here / "small" / name).read_text() == "mine"


def test_a_card_that_somebody_wrote_is_kept(here):
    (here / "small").mkdir()
    (here / "small" / "README.md").write_text("# My encoder\n")
    hap("prune", save_encoder(here), "--texts", "texts.txt", "--ratio", 0.5, "--output", "small")
    card = (here / "small" / "README.md").read_text()
    assert "# My encoder" in card and "hap_transformers" in card  # The tag.


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


TWO = "\n".join(TEXTS[:2])
BAD = {
    "nothing": ([], "Pass either --ratio, .* or --plan"),
    "both": (["--ratio", "0.5", "--plan", "plan.json"], "not both"),
    "a setting of the other road": (["--plan", "plan.json", "--min-heads", "2"], "--min-heads belongs to --ratio"),
    "a method of the other road": (["--plan", "plan.json", "--method", "fisher"], "--method belongs to --ratio"),
    "no texts": (["--ratio", "0.5"], "No data are named"),
    "ratio": (["--ratio", "1.5", "--texts", "texts.txt"], "`ratio` is the share to remove"),
    "method": (["--ratio", "0.5", "--texts", "texts.txt", "--method", "guess"], "guess"),
    "empty": (
        ["--ratio", "0.5", "--texts", "empty.txt"],
        "'empty.txt': 0 different texts in 0 lines. Give at least 8",
    ),
    "one line": (["--ratio", "0.5", "--texts", "one.txt"], "'one.txt': 1 different texts in 1 lines"),
    "duplicates": (["--ratio", "0.5", "--texts", "same.txt"], "'same.txt': 1 different texts in 100 lines"),
    "null bytes": (["--ratio", "0.5", "--texts", "null.txt"], "'null.txt' is no text: it has null characters"),
    "rubbish": (["--ratio", "0.5", "--texts", "rubbish.txt"], "'rubbish.txt' is not UTF-8: byte 0x89 in line 1"),
    "parquet": (["--ratio", "0.5", "--texts", "no.parquet"], "'no.parquet' cannot be read as Parquet"),
    "column": (["--ratio", "0.5", "--texts", "pairs.jsonl", "--column", "text"], "has no column 'text'; it has query"),
    "no column": (["--ratio", "0.5", "--texts", "pairs.jsonl"], "Name the one of the texts by --column, or the two"),
    "three": (
        ["--ratio", "0.5", "--texts", "pairs.jsonl", *("--column query --column passage --column c".split())],
        "--column names query, passage, c",
    ),
    "pairs": (
        ["--ratio", "0.5", "--texts", "pairs.jsonl", "--column", "query", "--column", "passage"],
        "is a sentence encoder, which reads single texts. Name one --column",
    ),
    "columns of lines": (["--ratio", "0.5", "--texts", "texts.txt", "--column", "a"], "'texts.txt' is read line by"),
    "a missing file": (["--ratio", "0.5", "--texts", "no.txt"], "There is no file 'no.txt'"),
    "a folder": (["--ratio", "0.5", "--texts", "encoder"], "'encoder' is a folder; name a file"),
    "labels": (["--ratio", "0.5", "--train-file", "train.csv"], "it has no loss on this task. Pass --texts"),
    "memory": (
        ["--ratio", "0.5", "--texts", "texts.txt", "--max-memory", "much"],
        "`max_memory` is a number of bytes",
    ),
    "length": (
        ["--ratio", "0.5", "--texts", "texts.txt", "--length", "2"],
        "Texts of 2 tokens have no room for words",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_and_nothing_is_written(here, arguments, message):
    source = save_encoder(here)
    (here / "empty.txt").write_text("")
    (here / "one.txt").write_text("one line")
    (here / "same.txt").write_text("the same\n" * 100)
    (here / "null.txt").write_bytes(b"PNG\0\0\1" * 20)
    (here / "rubbish.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (here / "no.parquet").write_bytes(b"PAR1 rubbish")
    write_csv(here / "train.csv", ROWS)
    model = SentenceTransformer(str(source), device="cpu")[0].auto_model
    PruningPlan.for_model(model, heads={0: [1]}).save(here / "plan.json")
    before = contents(here)
    with pytest.raises((ValueError, OSError), match=message):
        hap("prune", source, "--output", "small", *arguments)
    assert contents(here) == before and not (here / "small").exists()


def test_the_tokenizer_of_another_model_is_named(here):
    source = save_encoder(here)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(source)
    for file in ("texts.txt",):
        with pytest.raises(ValueError, match=r"have the token '.*', number \d+, and '.*encoder' knows 40 tokens"):
            hap("prune", source, "--texts", file, "--ratio", 0.5, "--output", "small")
    assert not (here / "small").exists()


def test_texts_for_a_model_of_images_are_refused(here):
    ZOO["vit"].model(torch.float32).save_pretrained("vit")
    with pytest.raises(ValueError, match="'vit' reads 'pixel_values', not texts"):
        hap("prune", "vit", "--texts", "texts.txt", "--ratio", 0.5, "--output", "small")
    assert not (here / "small").exists()
    hap("prune", "vit", "--method", "magnitude", "--ratio", 0.5, "--output", "small")  # Without texts it is pruned.


def test_a_convolutional_network(here):
    """It says what it needs, and prunes by what needs no data."""
    net = CONVNETS["resnet-basic"]
    net.model(torch.float32).save_pretrained("cnn")
    for named in ((), ("--texts", "texts.txt"), ("--task", "rte")):
        with pytest.raises(ValueError, match="'cnn' reads 'pixel_values', not texts.*a --method that needs none"):
            hap("prune", "cnn", *named, "--ratio", 0.5, "--output", "small")
    assert not (here / "small").exists()
    hap("prune", "cnn", "--method", "magnitude", "--ratio", 0.5, "--implant-ratio", 0.3, "--output", "small")
    plan, printed = PruningPlan.load("small/pruning_plan.json"), hap("info", "small")
    gone = [len(plan.removed["channels"].get(layer, ())) - plan.ranks.get(layer, 0) for layer in range(3)]
    assert printed["channels"] == [8 - gone[0], 8 - gone[1], 12 - gone[2]] and printed["dense_channels"] == [8, 8, 12]
    assert printed["implants"] == [plan.ranks.get(layer, 0) for layer in range(3)] and sum(printed["implants"]) > 0
    left, linear = sum(printed["channels"]), sum(printed["implants"])
    card = Path("small/README.md").read_text()
    assert f"A model with {left} of 28 channels ({linear} of them with a 1x1 filter, as implants) left." in card
    assert "implant" in Path("small/report.html").read_text()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_long_lines_are_cut_with_a_note(here, kind):
    source = save_encoder(here) if kind == "encoder" else save_transformer(here)
    limit = 16 if kind == "encoder" else 32  # The encoder's own, or the tokenizer's.
    (here / "long.txt").write_text("\n".join([*TEXTS, "good film " * 40, "bad plot " * 40]))
    command = ["prune", str(source), "--texts", "long.txt", "--ratio", "0.5", "--output", "small"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert f"hap: 2 of 42 texts have more than {limit} tokens and are cut." in result.stderr.splitlines()
    result = CliRunner().invoke(app, [*command, "--length", "40", "--overwrite"], catch_exceptions=False)
    assert f"Texts are cut to {limit} tokens, not 40: Bert" in result.stderr
    results = json.loads(Path("small/results.json").read_text())
    assert results["batch"] == [8, 32] and results["flops"]["pruned"] < results["flops"]["dense"]


def test_the_extra_is_named_by_every_command(here, monkeypatch):
    source = save_encoder(here)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for command in (["info", source], ["bench", source, source], ["score", source, "--texts", "texts.txt"]):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'hap_transformers\[sentence-transformers\]'"):
            hap(*command)
