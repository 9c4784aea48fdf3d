"""`hap prune --budget model --trim-vocabulary`: files, figures, and what is refused."""

import json
import re

import pytest
import torch
from encoders import TEXTS, save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner
from vocabularies import SEEN, TOKENIZERS, model_for

from hap_transformers import PruningPlan
from hap_transformers.cli import app
from hap_transformers.efficiency import count_parameters


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def hap(*arguments):
    """What a command prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception or result.output
    return json.loads(result.stdout)


LINES = [f"{text} {other}" for text in SEEN for other in SEEN]


@pytest.fixture
def here(tmp_path, monkeypatch):
    tokenizer = TOKENIZERS["WordPiece"]()
    model = model_for(tokenizer, task="ForSequenceClassification").eval()
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(LINES))
    monkeypatch.chdir(tmp_path)
    return model, tokenizer


def test_trims_prunes_and_saves_both(here):
    dense, tokenizer = here
    command = ("prune", "dense", "--texts", "texts.txt", "--budget", "model", "--output", "small")
    printed = hap(*command, "--ratio", 0.5, "--trim-vocabulary")
    small, smaller = (auto.from_pretrained("small") for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    left, whole = count_parameters(small), count_parameters(dense)
    trimmed = whole - (len(tokenizer) - len(smaller)) * 16
    assert printed["parameters"] == {"dense": whole, "pruned": left} and left <= 0.5 * trimmed
    assert printed["vocabulary"]["kept"] == len(smaller) < len(tokenizer)
    assert sum(printed["saved"].values()) == trimmed - left
    assert printed["bytes"] == {"dense": 4 * whole, "pruned": 4 * left}
    for phase, parts in printed["parts"].items():
        assert sum(parts.values()) == printed["parameters"][phase]
    for phase, model in (("dense", dense), ("pruned", small)):
        norm = 2 * 16
        of_embeddings = sum(p.numel() for p in model.bert.embeddings.parameters()) - norm
        assert printed["parts"][phase]["embeddings"] == of_embeddings
    # Tokenizer and model belong together: the file's weights are the ones that were compared.
    results = json.loads(open("small/results.json").read())
    texts = [LINES[i] for i in torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()[8:]]
    with torch.no_grad():
        ours, theirs = (
            m(**t(texts, return_tensors="pt", return_token_type_ids=False)).logits.log_softmax(-1)
            for m, t in ((small, smaller), (dense, tokenizer))
        )
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert results["fidelity"]["kl"] == pytest.approx(kl.item(), abs=1e-5)
    card, page = (open(f"small/{name}").read() for name in ("README.md", "report.html"))
    kinds = PruningPlan.load("small/pruning_plan.json").saved
    assert "trimmed to" in card and "![Parameters by part](parts.png)" in card and "size on disk" in card
    assert all(f"{saved:,} parameters of" in card for saved in kinds.values())
    assert "Embeddings and classifier stay" not in page and "parameters of" in page and "trimmed to" in page


def test_in_single_steps(here):
    """The basis of embeddings goes with the model that `hap align` writes."""
    dense, _ = here
    score = ("score", "dense", "--texts", "texts.txt", "--components", "embedding_dims", "--components", "neurons")
    assert "Call align_embeddings first" in str(run(*score).exception)
    aligned = hap("align", "dense", "--texts", "texts.txt", "--components", "embedding_dims", "--output", "aligned")
    hap("score", "aligned", *score[2:])
    planned = hap("plan", "sensitivity.safetensors", "--budget", "model", "--ratio", 0.3)
    pruned = hap("prune", "aligned", "--plan", "plan.json", "--texts", "texts.txt", "--output", "small")
    small = AutoModelForSequenceClassification.from_pretrained("small")
    assert count_parameters(small) == planned["promise"]["parameters"] == pruned["parameters"]["pruned"]
    assert count_parameters(small) <= 0.7 * count_parameters(dense) == 0.7 * pruned["parameters"]["dense"]
    assert PruningPlan.load("plan.json").basis == small.config.aligned_embeddings == aligned["basis"]
    assert "what has a basis are" in str(run("align", "dense", "--components", "neurons", "--output", "b").exception)


def test_trims_alone(here):
    dense, tokenizer = here
    printed = hap("prune", "dense", "--texts", "texts.txt", "--ratio", 0, "--output", "small", "--trim-vocabulary")
    small, smaller = (auto.from_pretrained("small") for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    assert len(smaller) == small.config.vocab_size < len(tokenizer) and not any(printed["removed"].values())
    with torch.no_grad():
        ours, theirs = (
            m(**t(LINES, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
            for m, t in ((small, smaller), (dense, tokenizer))
        )
    torch.testing.assert_close(ours, theirs)


def test_a_sentence_encoder(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    monkeypatch.chdir(tmp_path)
    source = save_encoder(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:20]))
    command = ("prune", source, "--texts", "texts.txt", "--budget", "model", "--ratio", 0.4, "--output", "small")
    printed = hap(*command, "--trim-vocabulary")
    small = SentenceTransformer("small", device="cpu")
    assert count_parameters(small[0].auto_model) == printed["parameters"]["pruned"]
    assert len(small.tokenizer) == printed["vocabulary"]["kept"]
    assert 0.5 < printed["fidelity"]["cosine"] <= 1 + 1e-6


def test_texts_of_another_language_are_warned_of(here, caplog):
    (texts := [f"東京は{i}大きな都市です。" for i in range(12)]).append("и снова вечер")
    with open("texts.txt", "w") as file:
        file.write("\n".join(texts))
    run("prune", "dense", "--texts", "texts.txt", "--ratio", "0", "--output", "small", "--trim-vocabulary")
    assert "of all their tokens are unknown. Other texts will be split into more tokens" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--ratio", 0.5, "--method", "random"), "--trim-vocabulary keeps the tokens of texts: pass --texts"),
        (("--plan", "plan.json", "--texts", "texts.txt"), "--trim-vocabulary belongs to --ratio"),
        (("--ratio", 0.5, "--texts", "empty.txt"), "0 different texts in 40 lines"),
        (("--ratio", 0.5, "--texts", "texts.txt", "--components", "embedding_dims"), "Set budget='model'"),
    ],
)
def test_what_cannot_work_is_named(here, arguments, message):
    open("empty.txt", "w").write(40 * " \n")
    result = run("prune", "dense", "--output", "small", "--trim-vocabulary", *arguments)
    assert result.exit_code and re.search(message, str(result.exception))


def test_a_tokenizer_of_another_size_is_named(here):
    dense, tokenizer = here
    model_for(tokenizer, task="ForSequenceClassification", more=-2).save_pretrained("dense")
    result = run("prune", "dense", "--texts", "texts.txt", "--ratio", 0.5, "--output", "small", "--trim-vocabulary")
    assert "the tokenizer is another model's" in str(result.exception)
