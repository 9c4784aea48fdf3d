"""Prints how many MiB one contender needs at its peak beyond the loaded model and data; run in a process of its own.

python benchmarks/peak_memory.py DATA_DIR CONTENDER NUMBER_OF_BATCHES REPEATS
"""

import sys
from pathlib import Path

import workloads


def resident(field: str) -> float:
    """A field of this process's memory status, in MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    data_dir, contender, count, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    model, batches = workloads.load_model(), workloads.load_batches(data_dir, count)
    workloads.forward_backward(model, [{name: value[:1] for name, value in batches[0].items()}])  # Loads the kernels.
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak of loading.
    before = resident("VmRSS")
    getattr(workloads, contender)(model, batches * repeats)
    print(resident("VmHWM") - before)
