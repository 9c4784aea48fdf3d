"""The main job of language models, and its answers to wrong input."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hap_transformers import HapTrainer
from language_scripts import causal_models, run_clm_hap
from language_scripts.demo_model import demo_tokenizer
from language_scripts.generation import tokens_per_second
from language_scripts.run_clm_hap import DEFAULTS, defaults_for, main, run


WORDS = ["the river runs past the old mill", "a runner sings by the river", "mills and rivers run slower"]
TEXT = "\n".join(WORDS[i * i % 3] for i in range(60))
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a text, and a tiny Llama that knows a little of it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("clm")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = demo_tokenizer(TEXT)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=64)
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(TEXT).input_ids)[: 16 * 20].view(-1, 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(15):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def short(tmp_path, files, *more):
    """Flags of a short run on the CPU."""
    command = ["--model_name_or_path", files / "model", "--train_file", files / "text.txt", "--block_size", 16]
    command += ["--output_dir", tmp_path / "out", "--use_cpu", "--disable_tqdm", "True", "--bf16", "False", *more]
    return list(map(str, command))


def test_a_model_end_to_end(tmp_path, files, capsys):
    (tmp_path / "other.txt").write_text("\n".join(reversed(TEXT.split("\n"))))
    more = ["--validation_file", tmp_path / "other.txt", "--ratio", "0.5", "--recovery_epochs", "1"]
    results = main(short(tmp_path, files, *more))
    out = tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    assert set(results["metrics"]) == {"dense", "pruned", "recovered"} and "fine-tune" not in results["seconds"]
    assert results["encoder_parameters"]["pruned"] <= 0.5 * results["encoder_parameters"]["dense"]
    assert all(rate > 0 for rate in results["tokens_per_second"].values())
    assert results["task"] == "text" and results["model"] == "model" and results["batch"] == [4, 16]
    reloaded, tokenizer = (cls.from_pretrained(out) for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor(tokenizer((tmp_path / "other.txt").read_text()).input_ids)
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    logits = reloaded(blocks).logits[:, :-1]
    own = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    figures, (low, high) = results["metrics"]["recovered"], results["intervals"]["recovered"]["perplexity"]
    assert figures["perplexity"] == pytest.approx(math.exp(own), rel=1e-3) and low < figures["perplexity"] < high
    card, page = ((out / name).read_text() for name in ("README.md", "report.html"))
    assert "generated tokens a second" in card and "generated tokens a second" in page
    assert str(tmp_path) not in card + page and "import AutoModelForCausalLM" in page
    assert "Generated tokens a second" in capsys.readouterr().out


def test_generation_is_timed_within_the_positions_of_a_model():
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=20, vocab_size=50, eos_token_id=None)
    seen, model = [], GPT2LMHeadModel(config).eval()
    model.transformer.wpe.register_forward_pre_hook(lambda module, args: seen.append(int(args[0].max())))
    assert tokens_per_second({"dense": model}, torch.arange(40)[None])["dense"] > 0
    assert max(seen) == 18  # The last token is generated, and not read.


def test_a_failure_in_measuring_costs_leaves_the_model(tmp_path, files, monkeypatch):
    monkeypatch.setattr(run_clm_hap, "tokens_per_second", lambda *args: pytest.fail("out of memory"))
    with pytest.raises(pytest.fail.Exception):
        main(short(tmp_path, files))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config["quant_method"] == "hap"


def test_it_goes_on_after_a_kill(tmp_path, files, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "prune", lambda self, plan: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(short(tmp_path, files))
    monkeypatch.setattr(HapTrainer, "estimate_sensitivity", lambda self: pytest.fail("scored again"))
    assert main(short(tmp_path, files))["model"] == "model"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--block_size", "4000"], "takes 64 tokens"),
        (["--block_size", "1"], "--block_size must be at least 2"),
        (["--train_file", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--model_name_or_path", "nowhere.gguf"], "no file 'nowhere.gguf'"),
        (["--max_eval_samples", "0"], "--max_eval_samples must be at least 1"),
        (["--ratio", "1.5"], "`ratio`"),
    ],
)
def test_wrong_flags(tmp_path, files, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(short(tmp_path, files, *more))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short(tmp_path, files):
    (tmp_path / "short.txt").write_text("the river runs")
    with pytest.raises(ValueError, match="'.*short.txt' has . tokens, fewer than a block of 16"):
        main(short(tmp_path, files, "--train_file", tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="has one block of 16 tokens, and a tenth of the blocks is held out"):
        (tmp_path / "short.txt").write_text(" ".join(WORDS))
        main(short(tmp_path, files, "--train_file", tmp_path / "short.txt"))


def test_another_models_tokenizer(tmp_path, files):
    scrambled = AutoTokenizer.from_pretrained(files / "model")
    vocabulary = scrambled.get_vocab()
    tokens, ids = sorted(vocabulary, key=vocabulary.get), sorted(vocabulary.values())
    backend = json.loads(scrambled.backend_tokenizer.to_str())
    backend["model"]["vocab"] = dict(zip(tokens, [ids[0], *reversed(ids[1:])], strict=True))
    scrambled.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(ValueError, match="one that guesses among its .* tokens has .* belongs to the model"):
        main(short(tmp_path, files, "--tokenizer_name", tmp_path / "tokenizer"))
    demo_tokenizer(TEXT * 9 + " ".join(map(str, range(3000)))).save_pretrained(tmp_path / "larger")
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(3000))))
    with pytest.raises(ValueError, match="The texts have the token '.*', number .* knows"):
        main(short(tmp_path, files, "--tokenizer_name", tmp_path / "larger", "--train_file", tmp_path / "numbers.txt"))


def test_a_loss_that_is_not_finite(tmp_path, files):
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3e4)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3e4)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "large")
    command = short(tmp_path, files, "--model_name_or_path", tmp_path / "large", "--dtype", "float16")
    with pytest.raises(ValueError, match="has a loss of nan on the validation text. Its weights are in float16; pass"):
        main(command)


def test_a_model_larger_than_the_memory_is_not_loaded(tmp_path, files, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(causal_models.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="parameters, which take .* GiB in float32; 0.0 GiB of memory are free"):
        main(short(tmp_path, files))


def test_errors_are_one_line_after_the_scripts_name(tmp_path, files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_clm_hap.py", *short(tmp_path, files, "--train_file", "nowhere")])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == "run_clm_hap.py: There is no file 'nowhere'."


def test_defaults_follow_what_the_command_names():
    assert defaults_for(["--model_name_or_path", "x"]) == DEFAULTS
    assert defaults_for([])["num_train_epochs"] > DEFAULTS["num_train_epochs"] == 0
