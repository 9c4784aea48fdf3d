"""Two processes find what one finds, without triggering DDP's hooks."""

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model

from hap_transformers import METHODS, PruningPlan, Sensitivity, apply_plan, estimate_sensitivity, reconstruct


def refitted(batches, accelerator=None):
    """A model with an implant, refitted."""
    dense, smaller = make_model(), make_model()
    plan = PruningPlan.for_model(smaller, heads={0: [1, 2]}, neurons={0: range(6)}, implants={0: 2})
    apply_plan(smaller, plan)
    reconstruct(smaller, dense, batches, init_implants=[0], progress=False, accelerator=accelerator)
    return smaller


def forbidden(state, bucket):
    raise AssertionError("a DDP hook fired")


def in_a_process(folder):
    """What each of two processes does."""
    torch.set_num_threads(1)  # Threads of the process that this one was forked from are not here.
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(accelerator.process_index)  # Processes need not agree in their random state.
    model = accelerator.prepare(make_model())
    assert type(model).__name__ == "DistributedDataParallel"
    model.register_comm_hook(None, forbidden)
    batches = [make_batch(size=2 + seed % 3, seed=seed) for seed in range(5)]
    for method in METHODS:
        for name, settings in (("all", {}), ("tolerance", {"tolerance": 0.6})):
            settings = {**settings, "accelerator": accelerator, "state_file": str(folder / "state"), "progress": False}
            result = estimate_sensitivity(model, batches, method, **settings)
            result.save(folder / f"{method}-{name}-{accelerator.process_index}")
    save_file(refitted(batches, accelerator).state_dict(), folder / f"refitted-{accelerator.process_index}")
    accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their results. They are forked: to import everything takes them seconds."""
    folder = tmp_path_factory.mktemp("processes")
    debug_launcher(in_a_process, (folder,), num_processes=2)
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
