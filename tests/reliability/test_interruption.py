"""A run that is killed at any moment ends like a whole one, by the same command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from script_inputs import flags, own_files
from tiny import LONG


KILLS = 24 if LONG else 2


@pytest.mark.parametrize("saving", [["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "1"], []])
def test_killed_runs_end_like_a_whole_one(tmp_path, model_dir, saving, tell):
    job = flags(tmp_path, model_dir, *own_files(tmp_path), "--max_examples", "8", "--num_train_epochs", "4", *saving)
    job += ["--per_device_train_batch_size", "4"]
    del job[job.index("--output_dir") : job.index("--output_dir") + 2]
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(tmp_path / "runs"), str(KILLS // 2), "0", *job]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= KILLS // 2
    whole = tmp_path / "runs" / "whole"
    assert not list((tmp_path / "runs").glob("*/.unfinished*"))
    for run in range(told["runs"]):
        killed = tmp_path / "runs" / f"killed-{run}"
        assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}
        assert (killed / "pruning_plan.json").read_bytes() == (whole / "pruning_plan.json").read_bytes()
        results = [json.loads((folder / "results.json").read_text()) for folder in (killed, whole)]
        assert results[0]["metrics"] == results[1]["metrics"]
        weights = [load_file(folder / "model.safetensors") for folder in (killed, whole)]
        assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())
    tell(**{"killed_with_checkpoints" if saving else "killed": told["phases"]})
