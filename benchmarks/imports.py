"""What importing the package adds to importing Transformers' `Trainer`, in new processes that take turns."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


LIMIT = 1.10
STATEMENTS = {
    "trainer": "from transformers import Trainer",
    "package": "from transformers import Trainer; import hap_transformers",
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each process, by what it imports."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(1 + repeats):  # The first round fills the caches.
        for name, statement in STATEMENTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: own[1:] for name, own in seconds.items()}


def main() -> None:
    """Measures, writes `imports.json` beside this file and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    seconds = measure(parser.parse_args().repeats)
    ratios = sorted(own / base for own, base in zip(seconds["package"], seconds["trainer"], strict=True))
    found = {
        "ratio": round(median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "limit": LIMIT,
        "seconds": {name: round(median(own), 2) for name, own in seconds.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"{found['ratio']:.2f} ({spread}) of importing Trainer; at most {LIMIT:.2f} wanted")


if __name__ == "__main__":
    main()
