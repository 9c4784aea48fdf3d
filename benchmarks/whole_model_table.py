"""The tables of the whole model's benchmarks, as Markdown."""

import statistics
from collections.abc import Sequence

from glue_scripts.compare_glue.cells import Cell, gain, main_metric

from .whole_model import DENSE, TRIMMED, WAYS


def whole_model_table(cells: Sequence[Cell]) -> str:
    """Formats all ways, a line a share of the parameters that is gone, means of the seeds.

    Args:
        cells (`Sequence[Cell]`): The cells, with the dense model's among them.
    """
    (dense,) = (cell for cell in cells if cell["way"] == DENSE)
    lines = [
        "| removed | way | million parameters, of these in the layers | Spearman | cosine, here and elsewhere |",
        "| --- | --- | --- | --- | --- |",
        _line("nothing", [dense]),
    ]
    lines += [
        _line(f"{1 - cell['parameters'] / dense['parameters']:.0%}", [cell])
        for cell in cells
        if cell["way"] == TRIMMED
    ]
    for share in sorted({cell["share"] for cell in cells} - {0.0}):
        for way in WAYS:
            if seeds := [cell for cell in cells if (cell["way"], cell["share"]) == (way, share)]:
                lines.append(_line(f"{share:.0%}", seeds))
    return "\n".join(lines)


def vocabulary_table(rows: Sequence[dict]) -> str:
    """Formats what trimming leaves of the vocabulary and the model, and what it costs, a line a task.

    Args:
        rows (`Sequence[dict]`): A row a task and seed. Counts are the same for all seeds. Quality may be missing.
    """
    names = ("task", "training texts", "tokens left", "parameters gone", "validation texts split otherwise")
    lines = [f"| {' | '.join(names)} | unknown words more | dense | points after trimming |", "| --- |" + " --- |" * 7]
    for task in dict.fromkeys(row["task"] for row in rows):
        seeds = [row for row in rows if row["task"] == task]
        row, measured = seeds[0], [row for row in seeds if "trimmed" in row]
        gone = 1 - row["parameters"]["after"] / row["parameters"]["before"]
        changes = [gain(seed, "trimmed") for seed in measured]
        cells = [
            row["task"],
            f"{row['texts']:,}",
            f"{row['kept']:,} of {row['tokens']:,}",
            f"{gone:.0%}",
            f"{row['split_otherwise'] / row['validation_texts']:.0%}",
            str(row["unknown_tokens"]),
            f"{100 * statistics.mean(seed['dense'][main_metric(seed)] for seed in measured):.1f}" if measured else "",
            _points(changes) if changes else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def classifiers_table(cells: Sequence[Cell]) -> str:
    """Formats the points over dense before and after recovery, a line a task and share, means over seeds."""
    if not cells:
        return "These figures are open: `python -m benchmarks.whole_classifiers` makes them."
    lines = [
        "| task | dense | removed | of that embeddings | points over dense, pruned | recovered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, ratio in sorted({(cell["task"], cell["ratio"]) for cell in cells}):
        seeds = [cell for cell in cells if (cell["task"], cell["ratio"]) == (task, ratio)]
        dense = statistics.mean(100 * cell["dense"][main_metric(cell)] for cell in seeds)
        embeddings = statistics.mean(cell["saved"]["embedding_dims"] / sum(cell["saved"].values()) for cell in seeds)
        figures = [_points([gain(cell, phase) for cell in seeds]) for phase in ("pruned", "recovered")]
        lines.append(f"| {' | '.join([task, f'{dense:.1f}', f'{ratio:.0%}', f'{embeddings:.0%}', *figures])} |")
    return "\n".join(lines)


def _points(changes: Sequence[float]) -> str:
    """Their mean, and their range if there are several."""
    spread = f" ({min(changes):+.1f} to {max(changes):+.1f})" if len(changes) > 1 else ""
    return f"{statistics.mean(changes):+.1f}{spread}"


def width_table(rows: Sequence[dict]) -> str:
    """Formats what a narrower residual stream would cost, beside the default with as many parameters."""
    lines = ["| way | width | million parameters | Spearman | cosine |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        figures = f"{row['parameters'] / 1e6:.2f} | {100 * row['spearman']:.1f} | {row['cosine']:.3f}"
        lines.append(f"| {row['way']} | {row['width']} | {figures} |")
    return "\n".join(lines)


def _line(share: str, cells: Sequence[Cell]) -> str:
    """One way at one share: means, and the range of the correlation where there are several seeds."""

    def mean(name: str) -> float:
        return statistics.mean(cell[name] for cell in cells)

    spearman = [100 * cell["spearman"] for cell in cells]
    spread = f" ({min(spearman):.1f} to {max(spearman):.1f})" if len(cells) > 1 else ""
    columns = [
        share,
        str(cells[0]["way"]),
        f"{mean('parameters') / 1e6:.2f}, {mean('encoder_parameters') / 1e6:.2f}",
        f"{mean('spearman') * 100:.1f}{spread}",
        f"{mean('cosine'):.3f}, {mean('cosine_elsewhere'):.3f}",
    ]
    return "| " + " | ".join(columns) + " |"
