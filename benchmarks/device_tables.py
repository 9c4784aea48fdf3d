"""Formats the sections of `benchmarks.device` as Markdown."""

from collections.abc import Callable

from .device_decoding import decoding_table
from .markdown_table import promises_table, table


def machine_table(rows: list[dict]) -> str:
    """Formats names and versions."""
    (row,) = rows
    return "\n".join(
        ["| " + " | ".join(row) + " |", "| --- " * len(row) + "|", "| " + " | ".join(row.values()) + " |"]
    )


def phases_table(rows: list[dict]) -> str:
    """Formats the seconds of each phase of pruning, and the peak memory in GiB where it is known."""
    phases = list(rows[0]["seconds"])
    heads = ["model", "work", *(f"{phase}, s (GiB)" for phase in phases), "together, s", "should be at most"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["model"], row["work"]]
        for phase in phases:
            memory = f" ({row['bytes'][phase] / 2**30:.1f})" if phase in row["bytes"] else ""
            cells.append(f"{row['seconds'][phase]:.2f}{memory}")
        target = "" if row["target"] is None else f"{row['target']:.0f}"
        cells += [f"{sum(row['seconds'].values()):.1f}", target]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faster_table(rows: list[dict]) -> str:
    """Formats how many times faster pruned models are."""
    ideal = [f"{name} removed (ideal {value:.2f})" for name, value in rows[0]["ideal"].items()]
    heads = ["numbers", "batch", "passes", "dense, ms", *ideal]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["dtype"], f"{row['batch_size']} x {row['length']}", row["mode"], f"{row['dense_ms']:.2f}"]
        cells += [f"{value:.2f}" for value in row["faster"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The title and the table of each section.
TEXTS: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "machine": ("The machine", machine_table),
    "phases": ("Phases of pruning", phases_table),
    "passes": ("Passes of scoring, without elimination", table),
    "hutchinson": ("Hutchinson, four probes of one batch", table),
    "llama": ("Phases of pruning a language model, layers scored in parts", phases_table),
    "latency": ("Latency, dense over pruned", faster_table),
    "promises": ("Latency over dense that plans promised, and that was measured", promises_table),
    "decoding": ("Generation of a language model in bfloat16, 30 % of its layers removed", decoding_table),
}


def section_text(name: str, found: dict) -> str:
    """Formats a section: its title with the card, its table, and what could not be measured."""
    title, table_of = TEXTS[name]
    parts = [f"**{title}** ({found['card']}):"]
    parts += [table_of(found["rows"])] if found["rows"] else []
    parts += found["notes"]
    parts += [f"This section failed: {found['failed']}"] if "failed" in found else []
    return "\n\n".join(parts) + "\n"
