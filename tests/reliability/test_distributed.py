"""Two processes find what one finds, agree, and end when one dies."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from script_inputs import flags, own_files
from tiny import ROOT
from transformers import AutoModelForSequenceClassification
from two_processes import tuned, tuning_problem

from hap_transformers import METHODS, PruningPlan


SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(mode, folder, processes=2):
    folder.mkdir()
    return start([str(SCRIPT), mode, str(folder)], processes)


def start(script, processes=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def results(folder, processes=2):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def tensors(file):
    with safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def test_two_processes_score_like_one(tmp_path):
    for processes in (1, 2):
        done = launch("score", tmp_path / str(processes), processes)
        assert done.returncode == 0, done.stderr
    assert [result["processes"] for result in results(tmp_path / "2")] == [2, 2]
    for method in METHODS:
        alone, first, second = (
            tensors(tmp_path / file)
            for file in (f"1/{method}-0.safetensors", *(f"2/{method}-{i}.safetensors" for i in (0, 1)))
        )
        assert alone.keys() == first.keys()
        for name, expected in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-12, msg=f"{method} {name}")


def test_processes_prune_alike_and_one_writes(tmp_path):
    done = launch("prune", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path / "run")
    removed, basis = first["agreed"]["plan"]
    assert basis and removed["value_dims"] and removed["query_key_dims"]
    agreed = first["agreed"]
    assert agreed == second["agreed"] and agreed["pruned"] != agreed["recovered"]
    assert agreed["recovery"]["after"] < agreed["recovery"]["before"]
    assert agreed["undone"] and agreed["at last"] == agreed["recovered"]
    assert first["written"] and not second["written"]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "out")


def test_processes_train_a_layer_by_their_mean_gradient(tmp_path):
    done = launch("tune", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found[0]["alone"] == found[1]["alone"] == tuned(slice(0, 2), [2])
    first, second = (result["weights"] for result in found)
    layer, data = tuning_problem()
    optimizer, step = torch.optim.Adam(layer.parameters()), 0
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for _ in range(2):
        orders = [torch.randperm(n, generator=g).tolist() for n, g in zip((3, 2), generators, strict=True)]
        for places in itertools.zip_longest(*orders):
            pairs = [data[2 * place + rank] for rank, place in enumerate(places) if place is not None]
            optimizer.zero_grad()
            (sum((layer(x) - y).square().mean() for x, y in pairs) / len(pairs)).backward()
            optimizer.param_groups[0]["lr"] = 1e-2 * min((step + 1) / 20, 1) * (1 - step / 6)
            optimizer.step()
            step += 1
    assert first == second
    for found, parameter in zip(first, layer.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found).double(), parameter.detach().flatten(), rtol=1e-5, atol=1e-7)


def test_trainers_of_other_packages_in_two_processes(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("sentence_transformers")
    done = launch("others", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path / "run")
    assert first == second
    for removed, pruned, recovered, recovery in first["agreed"].values():
        assert removed["neurons"] and recovery["after"] <= recovery["before"]
        assert (pruned == recovered) == (recovery["step"] == 0)


def test_the_main_job_in_two_processes(tmp_path, model_dir):
    job = flags(tmp_path, model_dir, *own_files(tmp_path), "--max_examples", "8")
    done = start([str(ROOT / "glue_scripts" / "run_glue_hap.py"), *job])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert list(results["metrics"]) == ["dense", "pruned", "recovered"] and not (out / "_unfinished_run").exists()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    plan, left = PruningPlan.load(out / "pruning_plan.json"), model.config.quantization_config["value_dims"]
    assert plan.count("value_dims") == sum(plan.original["value_dims"]) - sum(map(sum, left.values())) > 0


def test_different_plans_are_an_error_in_every_process(tmp_path):
    done = launch("differ", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for result in results(tmp_path / "run"):
        assert result["untouched"] and len(result["told"]) == 2
        assert all("Processes [1] have another pruning plan than process 0" in told for told in result["told"])


def test_sharded_models_are_scored_and_saved(tmp_path):
    done = launch("shard", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for result in results(tmp_path / "run"):
        assert result["differences"].keys() == set(METHODS) - {"hessian_trace"}
        assert max(result["differences"].values()) < 1e-12
        assert "'hessian_trace' cannot score a model whose weights are sharded" in result["told"][0]
        assert "(FSDP). Prune before the model is wrapped. Nothing was pruned." in result["told"][1]
        assert "(FSDP). " in result["told"][2]
    whole, sharded = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name) for name in ("whole", "sharded")
    )
    assert sharded.config.pruned_heads == {0: [1]}
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True))


@pytest.mark.parametrize("mode, message", [("die", "SIGKILL"), ("fail", "Batch 3 has no tensors")])
def test_the_others_end_when_a_process_does(tmp_path, mode, message):
    began = time.monotonic()
    done = launch(mode, tmp_path / "run")
    assert done.returncode != 0 and message in done.stderr.replace("Signal 9", "SIGKILL")
    assert time.monotonic() - began < 60
