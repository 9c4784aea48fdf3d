"""The real client against a server on loopback: what is pushed must come back, with its card."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import yaml
from hub_server import running_hub
from huggingface_hub import ModelCard
from tiny import ROOT
from zoo import ZOO


pytestmark = pytest.mark.slow
# The client reads its endpoint when it is imported. In float64, the last bits of float32 weights show.
PUSH = """
import sys, torch
sys.path[:0] = sys.argv[1:2]
from trainers import Rows, make_trainer
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vocabularies import SEEN, model_for, wordpiece
from hap_transformers import HapConfig, trim_vocabulary
trainer = make_trainer(sys.argv[2], hub_model_id="me/by-trainer", hap_config=HapConfig(ratio=0.5))
trainer.model.config._name_or_path = "org/tiny"
trainer.evaluate()
trainer.prune()
trainer.evaluate()
trainer.train()
trainer.evaluate()
trainer.push_to_hub(
    dataset="my rows", dataset_tags="me/rows", dataset_args="all", license="apache-2.0", remote_code=True
)
trainer.model.push_to_hub("me/by-model")
trainer.model.push_to_hub("me/with-code", remote_code=True, tags=["tiny"])
own_words = "---\\ntags:\\n- mine\\n---\\n\\n# My own words\\n"
HfApi().create_repo("me/own-words")
HfApi().upload_file(path_or_fileobj=own_words.encode(), path_in_repo="README.md", repo_id="me/own-words")
trainer.model.push_to_hub("me/own-words", tags=["later"], revision="main")
config = HapConfig(ratio=0.5)
again = make_trainer(sys.argv[2] + "-again", model=trainer.model, hub_model_id="me/again", hap_config=config)
again.results = trainer.results
again.push_to_hub(dataset="my rows", dataset_tags="me/rows", dataset_args="all", license="apache-2.0")
trainer.model.push_to_hub("me/again", tags=["later"])
by_arguments = make_trainer(
    sys.argv[2] + "-arguments", push_to_hub=True, hub_model_id="me/by-arguments", hap_config=HapConfig(ratio=0.5)
)
by_arguments.prune()
by_arguments.save_model()
row = {name: value[None] for name, value in Rows()[0].items() if name != "labels"}
logits = trainer.model.eval().double()(**row).logits.tolist()
tokenizer = wordpiece()
model = model_for(tokenizer, task="ForSequenceClassification")
rows_before = model.config.vocab_size
trim_vocabulary(model, tokenizer, SEEN)
model.push_to_hub("me/trimmed")
tokenizer.push_to_hub("me/trimmed")
loaders = AutoModelForSequenceClassification, AutoTokenizer
outputs = [
    of_text(**given(SEEN, padding=True, return_tensors="pt")).logits.tolist()
    for of_text, given in ((model, tokenizer), [loader.from_pretrained("me/trimmed") for loader in loaders])
]
trimmed = {"rows before": rows_before, "tokens": len(tokenizer), "outputs": outputs}
"""
# All are forked from a process that has imported Transformers, which takes most of the time, and no more.
ALL = """
import json, multiprocessing, sys
import torch, transformers, transformers.trainer

def push(code):
    exec(code, given := {})
    return given["logits"], {name: tensor.tolist() for name, tensor in given["row"].items()}, given["trimmed"]

def load(package, repositories, row):
    if package == "without":
        sys.modules["hap_transformers"] = None
    else:
        import hap_transformers
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    inputs = {name: torch.tensor(values) for name, values in row.items()}
    models = [load(repository, trust_remote_code=package == "without") for repository in repositories]
    return [model.double()(**inputs).logits.tolist() for model in models]

assert "hap_transformers" not in sys.modules
repositories = json.loads(sys.argv[3])
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    logits, row, trimmed = pool.apply(push, [sys.stdin.read()])
    loaded = pool.starmap(load, [(*item, row) for item in repositories.items()], chunksize=1)
    print(json.dumps([logits, loaded, trimmed]))
"""
LOADED = {"with": ["me/by-trainer", "me/by-model"], "without": ["me/by-trainer", "me/with-code"]}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server after everything was pushed, the logits there were, and those of models with and without the package.

    Processes push and load.
    """
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": "hf_token",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", ALL, str(ROOT / "tests"), str(folder / "output"), json.dumps(LOADED)]
        settings = {"env": environment, "cwd": folder, "timeout": 300, "check": False}
        result = subprocess.run(command, input=PUSH, capture_output=True, text=True, **settings)
        assert result.returncode == 0, result.stderr[-3000:]
        expected, loaded, trimmed = json.loads(result.stdout.strip().splitlines()[-1])
        yield hub, expected, {**dict(zip(LOADED, loaded, strict=True)), "trimmed": trimmed}


@pytest.mark.parametrize("package", LOADED)
def test_loads_from_the_hub(pushed, package):
    _, (expected,), loaded = pushed
    assert len(loaded[package]) == 2
    for (logits,) in loaded[package]:
        assert logits == pytest.approx(expected, rel=1e-12)


def test_a_trimmed_vocabulary_comes_back_with_its_model(pushed):
    hub, _, loaded = pushed
    trimmed, files = loaded["trimmed"], hub.repositories["me/trimmed"]
    rows = safetensors.torch.load(files["model.safetensors"])["bert.embeddings.word_embeddings.weight"].shape[0]
    assert rows == trimmed["tokens"] == json.loads(files["config.json"])["vocab_size"] < trimmed["rows before"]
    before, after = trimmed["outputs"]
    assert before == after


def test_one_commit_with_weights_card_and_picture(pushed):
    hub, _, _ = pushed
    by_model = [commit["paths"] for commit in hub.commits if commit["repository"] == "me/by-model"]
    assert [sorted(paths) for paths in by_model] == [
        ["README.md", "config.json", "head_ranks.png", "model.safetensors", "structure.png"]
    ]
    assert not any("modeling_hap.py" in paths for paths in by_model)
    assert hub.repositories["me/by-model"]["structure.png"].startswith(b"\x89PNG")
    weights = {file for files in hub.repositories.values() for file in files if "model." in file}
    assert weights == {"model.safetensors"}


@pytest.mark.parametrize("repository", ["me/by-trainer", "me/by-model", "me/with-code"])
def test_card(pushed, repository):
    hub, _, _ = pushed
    card = ModelCard(hub.repositories[repository]["README.md"].decode())
    assert {"hap", "pruned", "hap_transformers"} <= set(card.data.tags)
    (name,) = {result.task_type for result in card.data.eval_results}
    assert name == "text-classification"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values.keys() == {"loss", "accuracy"} and 0 <= values["accuracy"] <= 1
    for phase in ("dense", "pruned", "recovered"):
        assert f"\n| {phase} | " in card.text
    for cost in ("parameters", "of these in the encoder", "FLOPs, one batch", "latency, one batch, ms"):
        (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {cost} | ")]
        dense, pruned = (float(cell.replace(",", "")) for cell in line.strip(" |").split(" | ")[1:])
        assert cost.startswith("latency") or pruned < dense
    assert "BertForSequenceClassification.from_pretrained" in card.text
    assert "| value_dims | " in card.text and "(structure.png)" in card.text and "arXiv:2101.08940" in card.text


def test_what_only_the_trainer_knows(pushed):
    hub, _, _ = pushed
    card = ModelCard(hub.repositories["me/by-trainer"]["README.md"].decode())
    assert card.data.base_model == "org/tiny" and card.data.license == "apache-2.0"
    assert "fine-tuned on my rows" in card.text and "scored by `kronecker`" in card.text
    assert "tiny" in ModelCard(hub.repositories["me/with-code"]["README.md"].decode()).data.tags


def test_training_arguments_push_what_is_saved(pushed):
    hub, _, _ = pushed
    files = hub.repositories["me/by-arguments"]
    record = json.loads(files["config.json"])["quantization_config"]
    assert record["quant_method"] == "hap" and record["neurons"]
    shapes = {name: tensor.shape for name, tensor in safetensors.torch.load(files["model.safetensors"]).items()}
    for layer, width in record["neurons"].items():
        assert shapes[f"bert.encoder.layer.{layer}.intermediate.dense.weight"][0] == width


def test_a_card_of_ours_is_written_anew_but_keeps_what_it_was_told(pushed):
    hub, _, _ = pushed
    card = ModelCard(hub.repositories["me/again"]["README.md"].decode())
    assert card.data.datasets == "me/rows" and "fine-tuned on my rows" in card.text
    assert card.data.license == "apache-2.0" and "later" in card.data.tags
    assert "| recovered | " in card.text


@pytest.mark.parametrize("repository", ["me/by-trainer", "me/again"])
def test_results_in_files_of_their_own(pushed, repository):
    hub, _, _ = pushed
    files = hub.repositories[repository]
    card = ModelCard(files["README.md"].decode())
    accuracy = {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"]
    assert [name for name in files if name.startswith(".eval_results")] == [".eval_results/rows_all_accuracy.yaml"]
    (entry,) = yaml.safe_load(files[".eval_results/rows_all_accuracy.yaml"])
    assert entry["dataset"] == {"id": "me/rows", "task_id": "all"} and entry["value"] == accuracy
    assert not any(name.startswith(".eval_results") for name in hub.repositories["me/by-model"])


def test_own_words_are_kept(pushed):
    hub, _, _ = pushed
    card = ModelCard(hub.repositories["me/own-words"]["README.md"].decode())
    assert card.text.strip() == "# My own words"
    assert card.data.tags == ["mine", "hap", "pruned", "hap_transformers", "later"]


def test_remote_code_only_where_it_was_asked_for(pushed):
    hub, _, _ = pushed
    for name, with_code in (("me/by-trainer", True), ("me/by-model", False), ("me/with-code", True)):
        files = hub.repositories[name]
        assert ("modeling_hap.py" in files) == with_code
        assert ("auto_map" in json.loads(files["config.json"])) == with_code


def test_dense_models_are_pushed_as_ever(monkeypatch):
    from hap_transformers.reporting import hub

    calls = []
    monkeypatch.setattr(hub, "_push_dense_model", lambda *args, **kwargs: calls.append((args, kwargs)))
    model = ZOO["bert"].model(torch.float32)
    model.push_to_hub("me/dense", private=True)
    assert calls == [((model, "me/dense"), {"private": True})]
