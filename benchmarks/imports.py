"""Measures what importing the package adds to importing Transformers' `Trainer`, in new processes that take turns.

Run it by `python -m benchmarks.imports`. It writes JSON and prints the ratio.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median


# Whoever imports the package has `Trainer` anyway, and should not notice the rest.
LIMIT = 1.10
STATEMENTS = {
    "trainer": "from transformers import Trainer",
    "package": "from transformers import Trainer; import hap_transformers",
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Measures processor seconds of each process, by what it imports. Other work on the machine hardly moves them."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(1 + repeats):  # The first round fills the caches.
        for name, statement in STATEMENTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    """Measures, writes `imports.json` beside this file, and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    seconds = measure(parser.parse_args().repeats)
    ratios = sorted(package / trainer for package, trainer in zip(seconds["package"], seconds["trainer"], strict=True))
    found = {
        "ratio": round(median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "limit": LIMIT,
        "seconds": {name: round(median(values), 2) for name, values in seconds.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"{found['ratio']:.2f} ({spread}) of importing Trainer; at most {LIMIT:.2f} wanted")


if __name__ == "__main__":
    main()
