"""Two processes find what one finds, without triggering DDP's hooks."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, make_batch, make_model

from hap_transformers import METHODS, PruningPlan, Sensitivity, apply_plan, estimate_sensitivity, reconstruct


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from tiny import make_batch, make_model
from hap_transformers import METHODS, estimate_sensitivity
from safetensors.torch import save_file
from sensitivity.test_accumulate import refitted

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # Processes need not agree in their random state.
model = accelerator.prepare(make_model())
assert type(model).__name__ == "DistributedDataParallel"
def forbidden(state, bucket):
    raise AssertionError("a DDP hook fired")
model.register_comm_hook(None, forbidden)
batches = [make_batch(size=2 + seed % 3, seed=seed) for seed in range(5)]
for method in METHODS:
    for name, settings in (("all", {}), ("tolerance", {"tolerance": 0.6})):
        state_file = sys.argv[1] + "/state"
        result = estimate_sensitivity(
            model, batches, method, accelerator=accelerator, progress=False, state_file=state_file, **settings
        )
        result.save(f"{sys.argv[1]}/{method}-{name}-{accelerator.process_index}")
smaller = refitted(batches, accelerator)
save_file(smaller.state_dict(), f"{sys.argv[1]}/refitted-{accelerator.process_index}")
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()  # Otherwise its threads may still run when the interpreter ends.
"""


def refitted(batches, accelerator=None):
    """A model with an implant, refitted."""
    dense, smaller = make_model(), make_model()
    plan = PruningPlan.for_model(smaller, heads={0: [1, 2]}, neurons={0: range(6)}, implants={0: 2})
    apply_plan(smaller, plan)
    reconstruct(smaller, dense, batches, init_implants=[0], progress=False, accelerator=accelerator)
    return smaller


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their results."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, settings", [("all", {}), ("tolerance", {"tolerance": 0.6})])
def test_two_processes_agree_with_one(folder, method, name, settings):
    first, second = (Sensitivity.load(folder / f"{method}-{name}-{rank}") for rank in range(2))
    batches = [make_batch(size=2 + seed % 3, seed=seed) for seed in range(5)]
    seen = first.num_examples or None
    alone = estimate_sensitivity(make_model(), batches, method, progress=False, max_examples=seen)
    for field in ("scores", "order", "traces", "stderr"):
        torch.testing.assert_close(getattr(first, field), getattr(second, field), rtol=0, atol=0)
        torch.testing.assert_close(getattr(first, field), getattr(alone, field), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(first.interactions, alone.interactions)
    assert (first.num_examples, first.num_probes) == (alone.num_examples, alone.num_probes)
    assert first.reliability == second.reliability == pytest.approx(alone.reliability)
    assert first.converged == second.converged
    wanted = settings.get("tolerance")
    assert first.converged is (None if wanted is None or not seen else first.reliability >= wanted)
    if name == "all":
        assert first.num_examples in (0, 14)


def test_two_processes_refit_as_one(folder):
    expected = refitted([make_batch(size=2 + seed % 3, seed=seed) for seed in range(5)]).state_dict()
    first, second = (load_file(folder / f"refitted-{rank}") for rank in range(2))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-8, atol=1e-10)
