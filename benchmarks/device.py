"""Measures scoring, pruning and latency on a machine with a GPU, in at most nine minutes.

    python -m benchmarks.device

Models have random weights and inputs are random tokens, so nothing is downloaded. Every section has a time limit. Its
rows are written to JSON as they come, so a run that is killed keeps them. `--small` tries everything in seconds, also
where there is no GPU.
"""

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser

from hap_transformers.files import write_text
from hap_transformers.forward_modes import device_name

from . import device_sections as sections
from .device_decoding import decoding
from .device_tables import section_text


HERE = Path(__file__).parent


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str | None = None  # By default device.json in $OUT, or else beside this file.
    minutes: float = 9.0
    small: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Args:
        measure (`Callable`): Takes the device and the sizes, and yields rows.
        seconds (`float`): About how long it takes on an H100. It is left out where less time is left, and stopped
            after three times as long.
    """

    measure: Callable[[torch.device, sections.Sizes], Iterator[dict]]
    seconds: float


SECTIONS = {
    "machine": Section(sections.machine, 0),
    "phases": Section(sections.phases, 80),
    "passes": Section(sections.passes, 50),
    "hutchinson": Section(sections.hutchinson, 30),
    "llama": Section(sections.llama, 120),
    "latency": Section(sections.latency, 60),
    "promises": Section(sections.promises, 60),
    "decoding": Section(decoding, 90),
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in the code inside once the time is over."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    section: Section, device: torch.device, sizes: sections.Sizes, left: float, write: Callable[..., None]
) -> None:
    """Measures a section.

    Args:
        section (`Section`): The section.
        device (`torch.device`): Where.
        sizes (`Sizes`): How large its workloads are.
        left (`float`): Seconds left for everything.
        write (`Callable`): Takes what is known of the section, after every row.
    """
    found: dict = {"card": device_name(device), "seconds": 0.0, "rows": [], "notes": []}
    start = time.perf_counter()
    if left < section.seconds or left <= 0:
        found["notes"].append(f"Not measured: it takes about {section.seconds:.0f} s, and {left:.0f} s were left.")
    else:
        try:
            with time_limit(min(left, max(3 * section.seconds, 60))):
                for row in section.measure(device, sizes):
                    found["rows" if "note" not in row else "notes"].append(row.get("note", row))
                    found["seconds"] = time.perf_counter() - start
                    write(found)
        except Exception as error:
            traceback.print_exc()
            found["failed"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.perf_counter() - start
    write(found)


def output_file(args: Arguments) -> Path:
    """The file of results; figures of small models are not left beside the others."""
    default = tempfile.gettempdir() if args.small else HERE
    return Path(args.output or Path(os.environ.get("OUT", default)) / "device.json")


def main() -> None:
    """Measures every section that there is time for; prints and writes as it goes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    deadline = time.perf_counter() + 60 * args.minutes
    logging.getLogger("hap_transformers").setLevel("ERROR")  # Scores of random weights rank nothing reliably.
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        sys.exit("There is no CUDA device. `--small` tries the benchmark on the CPU; its figures say nothing.")
    results: dict = {"settings": asdict(args), "sections": {}}

    for name, section in SECTIONS.items():

        def write(found: dict, name: str = name) -> None:
            results["sections"][name] = found
            write_text(output_file(args), json.dumps(results, indent=2) + "\n")

        run(section, device, sections.SMALL if args.small else sections.FULL, deadline - time.perf_counter(), write)
        print(section_text(name, results["sections"][name]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if failed := [name for name, found in results["sections"].items() if "failed" in found]:
        sys.exit(f"These sections failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
