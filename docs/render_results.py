"""Draws the README's picture and writes its tables from the runs in `docs/results/` and the benchmark's.

Each file there is the `results.json` of one run of `glue_scripts/run_glue_hap.py`, named after its task and seed; the
benchmarks' are `benchmarks/{sensitivity,latency,prune}.json`:

    python docs/render_results.py
"""

import json
import statistics
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure


HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from markdown_table import latency_table, multiples_table, phases_table  # noqa: E402
from markdown_table import table as table_of_ratios  # noqa: E402


PHASES = {"dense": "#4c566a", "pruned": "#d08770", "recovered": "#2a7f62"}


def load_runs() -> dict[str, list[dict]]:
    """The runs of each task, the demo first."""
    runs = defaultdict(list)
    for file in sorted(HERE.glob("results/*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runs[result["task"]].append(result)
    return dict(sorted(runs.items(), key=lambda item: (item[0] != "demo", item[0])))


def main_metric(run: dict) -> str:
    """The first metric that is not the loss."""
    return next(name for name in run["metrics"]["dense"] if name != "loss")


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs: dict[str, list[dict]]) -> str:
    """A Markdown table, a row a task."""
    lines = [
        "| task | examples | seeds | metric | dense | pruned | recovered | heads | parameters | FLOPs | reliability |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, group in runs.items():
        metric = main_metric(group[0])
        phases = [mean_and_spread([run["metrics"][phase][metric] for run in group], 3) for phase in PHASES]
        heads = group[0]["heads"]
        shares = [
            mean_and_spread([100 * (run[cost]["pruned"] / run[cost]["dense"] - 1) for run in group], 0) + " %"
            for cost in ("parameters", "flops")
        ]
        examples = f"{group[0]['num_examples']['validation']:,}"
        reliability = mean_and_spread([run["reliability"] for run in group], 2)
        kept = f"{heads['dense']} → {heads['pruned']}"
        cells = [task, examples, str(len(group)), metric, *phases, kept, *shares, reliability]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Bars of each task's metric by phase, and of the pruned model's cost as a share of the dense one's.

    The cost is that of the first task, the demo: latency is worth showing only where the machine was idle.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    quality, cost = figure.subplots(1, 2, width_ratios=[3, 2])
    for offset, (phase, colour) in enumerate(PHASES.items()):
        values = [[run["metrics"][phase][main_metric(run)] for run in group] for group in runs.values()]
        positions = [i + (offset - 1) * 0.27 for i in range(len(runs))]
        bars = quality.bar(positions, [statistics.mean(v) for v in values], 0.25, color=colour, label=phase)
        quality.bar_label(bars, fmt="%.3f", fontsize=7)
    labels = [f"{task}\n{main_metric(group[0]).replace('_', ' ')}" for task, group in runs.items()]
    quality.set_xticks(range(len(runs)), labels, fontsize=8)
    first = next(iter(runs.values()))[0]
    share = 1 - first["heads"]["pruned"] / first["heads"]["dense"]
    quality.set_title(f"Quality on validation, {share:.0%} of attention heads removed", fontsize=10)
    quality.set_ylim(0, 1.15)
    quality.legend(fontsize=7, loc="upper right", ncols=3)
    names = {"heads": "heads", "parameters": "parameters", "flops": "FLOPs", "latency_ms": "latency"}
    task, group = next(iter(runs.items()))
    shares = [statistics.mean(run[key]["pruned"] / run[key]["dense"] for run in group) for key in names]
    bars = cost.barh(list(names.values())[::-1], shares[::-1], color=PHASES["recovered"])
    cost.bar_label(bars, labels=[f"{value:.0%}" for value in shares[::-1]], fontsize=8, label_type="center", color="w")
    cost.set_xlim(0, 1)
    cost.set_title(f"What is left, as a share of dense ({task})", fontsize=10)
    for axes in (quality, cost):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def describe(benchmark: dict) -> str:
    """What the benchmark found about rankings, in words."""
    found, rounds = benchmark["findings"], benchmark["settings"]["repeats"]
    exact, noisy, spearman = found["gauss_newton"], found["hutchinson"], found["bf16_fp32_spearman"]
    reliability = noisy["reliability"]
    # Spearman-Brown: the odds of the reliability grow in proportion to the number of probes.
    factor = 9 * (1 - reliability) / max(reliability, 1e-3)
    outlook = (
        "enough for 0.9"
        if noisy["reached_0.9"]
        else f"by the Spearman-Brown formula 0.9 would take about {factor * noisy['probe_batches']:,.0f} of them, "
        f"{factor * noisy['seconds']:,.0f} s"
    )
    text = (
        f"MiniLM on batches of 32 MRPC pairs, two a pass (Hutchinson: one, with four probes), "
        f"{benchmark['machine']['threads']} CPU threads ({benchmark['machine']['cpu']}); medians and ranges of "
        f"{rounds} rounds, made by `make benchmark`. Memory is what tensors take beyond the model and data. On "
        f"{found['examples']} training pairs of the fine-tuned model one Gauss-Newton pass ranks heads with "
        f"reliability {exact['fp32']['reliability']:.3f} in {exact['fp32']['seconds']:.0f} s (bf16: "
        f"{exact['bf16']['reliability']:.3f} in {exact['bf16']['seconds']:.0f} s; rank correlation of bf16 with fp32 "
        f"scores {spearman['heads']:.4f} for heads, {spearman['neurons']:.4f} for neurons). Hutchinson in bf16 gets "
        f"to reliability {reliability:.2f} with {noisy['probe_batches']} probes of a batch in "
        f"{noisy['seconds']:.0f} s; {outlook}. The two rankings correlate by {noisy['spearman_to_gauss_newton']:.2f}: "
        f"noise lowers that, and so does what the Hessian has beyond the Gauss-Newton matrix."
    )
    return textwrap.fill(text, 119)


def describe_latency(latency: dict) -> str:
    """How the table of latencies is to be read."""
    text = (
        "Time of a forward pass over dense in the same round (quartiles of the rounds), and what share of the ideal "
        "speed-up, which is that of the FLOPs left, is reached. The same share of every layer's FLOPs is removed, "
        f"heads and neurons, on {latency['machine']['threads']} CPU threads ({latency['machine']['cpu']}). Models are "
        "of MiniLM's and BERT-base's shape. Small batches in bf16 are bound by the overhead of operations rather than "
        "by FLOPs. Made by `make benchmark`."
    )
    return textwrap.fill(text, 119)


def describe_pruning(pruning: dict) -> str:
    """How the table of pruning's phases is to be read."""
    layers, examples = (row["ratio"] for row in pruning["rows"])
    text = (
        f"{pruning['settings']['examples']} MRPC pairs in batches of 32, float32, {pruning['settings']['ratio']:.0%} "
        f"of the encoder removed, {pruning['machine']['threads']} CPU threads ({pruning['machine']['cpu']}); medians "
        f"of {pruning['settings']['repeats']} rounds, of BERT-base (random weights) one. Twice the layers take "
        f"{2 * layers:.2f} times as long, twice the examples {2 * examples:.2f} times. Made by `make benchmark`."
    )
    return textwrap.fill(text, 119)


def write_into_readme(name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(start)
    README.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    loaded = load_runs()
    draw(loaded, HERE / "images" / "results.png")
    benchmark = json.loads((BENCHMARKS / "sensitivity.json").read_text(encoding="utf-8"))
    write_into_readme("results", table(loaded))
    write_into_readme("benchmark", table_of_ratios(benchmark["rows"]) + "\n\n" + describe(benchmark))
    latency = json.loads((BENCHMARKS / "latency.json").read_text(encoding="utf-8"))
    parts = latency_table(latency["rows"]), describe_latency(latency), multiples_table(latency["multiples"])
    write_into_readme("latency", "\n\n".join(parts))
    pruning = json.loads((BENCHMARKS / "prune.json").read_text(encoding="utf-8"))
    write_into_readme("pruning", phases_table(pruning["phases"]) + "\n\n" + describe_pruning(pruning))
