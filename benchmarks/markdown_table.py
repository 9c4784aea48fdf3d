"""Formats the benchmarks' results as Markdown tables."""

import statistics

from glue_scripts.compare_glue.cells import gain


def table(rows: list[dict]) -> str:
    """Formats rows of ratios."""
    lines = ["| measure | ratio (range) | should be at most | values |", "| --- | --- | --- | --- |"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        values = " / ".join(f"{value:.2f}" if row["unit"] == "s" else f"{value:.0f}" for value in row["values"])
        spread = f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
        lines.append(f"| {row['measure']} | {spread} | {target} | {values} {row['unit']} |")
    return "\n".join(lines)


def latency_table(rows: list[dict]) -> str:
    """Formats time over dense by share removed, a line a model, number format and input.

    Each cell has the time ratio, its quartiles, and the share of the ideal speed-up that is reached.
    """
    shares = sorted({row["share"] for row in rows})
    lines = [
        "| model | numbers | batch | dense | " + " | ".join(f"{share:.0%} removed" for share in shares) + " |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in shares) + " |",
    ]
    groups: dict[tuple, dict[float, dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "dtype", "batch_size", "length"))
        groups.setdefault(key, {})[row["share"]] = row
    for (model, dtype, size, length), group in groups.items():
        cells = [
            f"{row['time']:.2f} ({row['lower']:.2f} to {row['upper']:.2f}), {row['flops'] / row['time']:.0%}"
            for row in (group[share] for share in shares)
        ]
        dense = f"{group[shares[0]]['dense_ms']:.0f} ms"
        lines.append(f"| {model} | {dtype} | {size} x {length} | {dense} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def multiples_table(rows: list[dict]) -> str:
    """Formats the time a FLOP by the number of neurons kept."""
    lines = ["| neurons kept a layer | numbers | time a FLOP, over 608 neurons (quartiles) |", "| --- | --- | --- |"]
    for row in rows:
        spread = f"{row['time']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})"
        lines.append(f"| {row['neurons']} | {row['dtype']} | {spread} |")
    return "\n".join(lines)


def promises_table(rows: list[dict]) -> str:
    """Formats the time over dense that plans by latency promised, and that the pruned models took."""
    lines = ["| model | batch | time to remove | promised | measured | error |", "| --- |" + " --- |" * 5]
    for row in rows:
        cells = [row["model"], f"{row['batch_size']} x {row['length']}", f"{row['share']:.0%}"]
        cells += [f"{row['promised']:.3f}", f"{row['measured']:.3f}", f"{row['error']:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phases_table(rows: list[dict]) -> str:
    """Formats the median seconds of each phase of pruning, and of all together with their range, a line a model."""
    phases = list(rows[0]["runs"][0])
    lines = [
        "| model | " + " | ".join(f"{phase}, s" for phase in phases) + " | together, s | should be at most |",
        "| --- |" + " --- |" * (len(phases) + 2),
    ]
    for row in rows:
        cells = [f"{statistics.median(run[phase] for run in row['runs']):.1f}" for phase in phases]
        totals = [sum(run.values()) for run in row["runs"]]
        spread = f" ({min(totals):.0f} to {max(totals):.0f})" if len(totals) > 1 else ""
        cells.append(f"{statistics.median(totals):.0f}{spread}")
        lines.append(f"| {row['model']} | " + " | ".join(cells) + f" | {row['target']:.0f} |")
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    """Formats the peak memory that a formula gives and that was measured, a line a model and job."""
    lines = [
        "| parameters | job | model, GB | formula, GB | measured, GB | should be at most, GB |",
        "| --- |" + " --- |" * 5,
    ]
    for row in rows:
        cells = [f"{row['billions']} billion", row["job"]]
        for value in (row["model"], row["formula"], row.get("peak"), row["target"]):
            cells.append("" if value is None else f"{value / 1e9:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def elimination_table(runs: list[list[dict]]) -> str:
    """Formats what steps of several neurons change: medians over samples, and ranges of the change of KL."""
    lines = [
        "| removed at once | seconds | rank correlation | same neurons, 60 / 80 % | KL over one by one, 60 / 80 % |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for rows in zip(*runs, strict=True):
        name = "one neuron" if rows[0]["one_in"] is None else f"1 / {rows[0]['one_in']} of those left"
        seconds, rank = (statistics.median(row[key] for row in rows) for key in ("seconds", "rank_correlation"))
        same = " / ".join(f"{statistics.median(row['same'][i] for row in rows):.1%}" for i in range(2))
        ratios = [[row["kl"][i] / run[0]["kl"][i] for row, run in zip(rows, runs, strict=True)] for i in range(2)]
        kl = " / ".join(f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios)
        lines.append(f"| {name} | {seconds:.1f} | {rank:.3f} | {same} | {kl} |")
    return "\n".join(lines)


def refit_examples_table(rows: list[dict]) -> str:
    """Formats the divergence after refits on ever more examples over that after 1,024, a line a task and ratio.

    Cells are medians over seeds, with the processor's seconds of the refit; that of 1,024 is the divergence itself.
    """
    counts = sorted({row["examples"] for row in rows})
    lines = ["| task | removed | " + " | ".join(f"{count:,}" for count in counts) + " |"]
    lines.append("| --- |" + " --- |" * (len(counts) + 1))
    for task, ratio in sorted({(row["task"], row["ratio"]) for row in rows}):
        cells = []
        for count in counts:
            runs = [row for row in rows if (row["task"], row["ratio"], row["examples"]) == (task, ratio, count)]
            first = {
                row["seed"]: row["kl"]
                for row in rows
                if (row["task"], row["ratio"]) == (task, ratio)
                if row["examples"] == 1024
            }
            if not runs:
                cells.append("")
                continue
            seconds = statistics.median(row["seconds"] for row in runs)
            ratios = [row["kl"] / first[row["seed"]] for row in runs]
            text = (
                f"{statistics.median(ratios):.2f}" if count != 1024 else f"KL {statistics.median(first.values()):.4f}"
            )
            cells.append(f"{text}, {seconds:.0f} s")
        lines.append(f"| {task} | {ratio:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refit_costs_table(rows: list[dict]) -> str:
    """Formats memory and seconds of a refit on many examples over those on few."""
    lines = ["| | few | many | ratio (range) | should be at most |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        unit, scale = ("GB", 1e9) if row["measure"] == "peak" else ("s", 1.0)
        values = [f"{row[name] / scale:.2f} {unit}" for name in ("few", "many")]
        spread = f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
        name = "peak memory of the process" if row["measure"] == "peak" else "seconds an example"
        lines.append(f"| {name} | {values[0]} | {values[1]} | {spread} | {row['target']:.2f} |")
    return "\n".join(lines)


def rank_latency_table(rows: list[dict]) -> str:
    """Formats the time over dense of models without whole heads and of models with fewer dimensions a head."""
    shares = sorted({row["share"] for row in rows})
    lines = [
        "| model | numbers | batch | "
        + " | ".join(f"{share:.0%} removed: heads / dimensions" for share in shares)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(shares),
    ]
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "dtype", "batch_size", "length"))
        groups.setdefault(key, {})[row["way"], row["share"]] = row
    for (model, dtype, size, length), group in groups.items():
        cells = [" / ".join(f"{group[way, share]['time']:.2f}" for way in ("heads", "ranks")) for share in shares]
        lines.append(f"| {model} | {dtype} | {size} x {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ranks_table(rows: list[dict]) -> str:
    """Formats the ways to prune attention: divergence from the dense model, points over it, and time over its."""
    ways = ("heads", "dimensions", "dimensions, tuned", "uneven dimensions")
    lines = [
        "| task | removed | " + " | ".join(f"{way}: KL, points, time" for way in ways) + " | KL over that of heads |",
        "| --- | --- |" + " --- |" * (len(ways) + 1),
    ]
    cells: dict[tuple, dict[str, dict[int, dict]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["ratio"]), {}).setdefault(row["way"], {})[row["sample"]] = row
    for (task, ratio), by_way in sorted(cells.items()):
        shown = [_means([*by_way[way].values()]) if way in by_way else "" for way in ways]
        ratios = [_over_heads(by_way, way) for way in ("dimensions", "dimensions, tuned") if way in by_way]
        lines.append(f"| {task} | {ratio:.0%} | {' | '.join(shown)} | {' / '.join(ratios)} |")
    return "\n".join(lines)


def _means(cells: list[dict]) -> str:
    values = zip(*((cell["kl"], gain(cell, "pruned"), cell["time"]) for cell in cells), strict=True)
    kl, points, time = map(statistics.mean, values)
    return f"{kl:.4f}, {points:+.1f}, {time:.2f}"


def _over_heads(by_way: dict[str, dict[int, dict]], way: str) -> str:
    """The divergence over that of whole heads on the same samples, and its range."""
    ratios = [cell["kl"] / by_way["heads"][sample]["kl"] for sample, cell in by_way[way].items()]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.2f}{spread}"
