"""Runs the main job repeatedly in processes that are killed at random moments; `test_interruption` starts it.

    python killed_runs.py OUTPUT_DIR KILLS SEED FLAGS...

Writes what an uninterrupted run leaves to `OUTPUT_DIR/whole`, and what those that were killed leave, once they have
come to an end, to `OUTPUT_DIR/killed-N`. Prints a JSON line: how often a run was killed, and in which phases.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
from glue_scripts import run_glue_hap  # noqa: E402


# After so many kills a run may finish.
KILLS_A_RUN = 3


def start(output: Path, flags: list[str]) -> int:
    """Starts the job in a forked process, which has everything imported."""
    child = os.fork()
    if not child:
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_glue_hap.main([*flags, "--output_dir", str(output)])
        os._exit(0)
    return child


def end_of(child: int) -> int:
    """Waits for a process, and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def phase(output: Path) -> str:
    """The phase in which a run was killed, by its files."""
    if (output / "results.json").exists():
        return "saving"
    for folder, name in (("_recovery", "recovery"), ("_unfinished_run/sensitivity.safetensors", "pruning")):
        if (output / folder).exists():
            return name
    return "scoring" if (output / "_unfinished_run/dense").exists() else "fine-tuning"


def main(folder: Path, kills: int, seed: int, flags: list[str]) -> None:
    """Runs once to the end, then kills."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    if end_of(start(folder / "whole", flags)):
        sys.exit((folder / "whole.log").read_text())
    seconds, moments = time.monotonic() - began, random.Random(seed)
    phases: dict[str, int] = {}
    killed = run = 0
    while killed < kills:
        output = folder / f"killed-{run}"
        for _ in range(KILLS_A_RUN):
            child = start(output, flags)
            time.sleep(moments.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            ended = end_of(child)
            if ended == 0:  # It finished before the kill.
                break
            if ended != -signal.SIGKILL:
                sys.exit(output.with_suffix(".log").read_text())
            killed += 1
            phases[phase(output)] = phases.get(phase(output), 0) + 1
        else:
            if end_of(start(output, flags)):
                sys.exit(output.with_suffix(".log").read_text())
        run += 1
    print(json.dumps({"kills": killed, "runs": run, "phases": phases, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
