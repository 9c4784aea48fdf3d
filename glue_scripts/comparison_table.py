"""The cells of a comparison as Markdown."""

from statistics import mean, stdev
from typing import Any


def table(cells: list[dict[str, Any]]) -> str:
    """Points below dense by task and ratio, mean over seeds and their standard deviation, as Markdown."""
    ratios, tasks = sorted({cell["ratio"] for cell in cells}), sorted({cell["task"] for cell in cells})
    lines = []
    for phase in ("pruned", "recovered"):
        if not all(phase in cell for cell in cells):
            continue
        header = [f"{phase}: points of accuracy over dense", *(f"{t} {r:.0%}" for t in tasks for r in ratios)]
        header += [f"mean {r:.0%}" for r in ratios]
        lines += ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
        for method in dict.fromkeys(cell["method"] for cell in cells):
            row, means = [method], {ratio: [] for ratio in ratios}
            for task in tasks:
                for ratio in ratios:
                    gains = [
                        100 * (cell[phase]["accuracy"] - cell["dense"]["accuracy"])
                        for cell in cells
                        if (cell["task"], cell["method"], cell["ratio"]) == (task, method, ratio)
                    ]
                    spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
                    row.append(f"{mean(gains):+.1f}{spread}" if gains else "")
                    means[ratio] += [mean(gains)] if gains else []
            row += [f"{mean(values):+.1f}" if len(values) == len(tasks) else "" for values in means.values()]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()
