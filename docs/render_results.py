"""Writes the tables of the README and of `docs/`, and draws the study's pictures, from committed results.

These are `docs/results/{cells,longer_recovery}.jsonl`, made by `glue_scripts/compare_glue.py`, and
`benchmarks/{sensitivity,latency,prune,imports}.json`:

    python docs/render_results.py
"""

import json
import sys
import textwrap
from pathlib import Path


HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHMARKS = HERE.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(HERE.parent / "glue_scripts")]
from comparison_grids import PRESETS  # noqa: E402
from comparison_latency import measure_latencies  # noqa: E402
from comparison_plots import plot_gains, plot_kept, plot_latency  # noqa: E402
from comparison_table import differences_table, seconds_table, table  # noqa: E402
from markdown_table import latency_table, multiples_table, phases_table  # noqa: E402
from markdown_table import table as table_of_ratios  # noqa: E402


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


def describe_reliability(figures: dict) -> str:
    """What the long form of the reliability tests has tried."""
    phases: dict[str, int] = {}
    for killed in (figures["killed"], figures["killed_with_checkpoints"]):
        for phase, count in killed.items():
            phases[phase] = phases.get(phase, 0) + count
    text = (
        f"The last `make test-reliability` killed {sum(phases.values())} runs of the main job (found afterwards in "
        f"{', '.join(f'{phase}: {count}' for phase, count in phases.items())}; without checkpoints, what is not saved "
        f"counts as pruning), tried {figures['wrong_inputs']} wrong inputs beside the scripts' flags, "
        f"loaded five kinds of mutated files {figures['fuzzed']:,} times each, and went {figures['rounds']} rounds "
        f"of scoring, pruning and reloading, in the last two thirds of which memory grew by {figures['grown']} MiB. "
        "All passed."
    )
    return textwrap.fill(text, 119)


def write_into(file: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = file.read_text(encoding="utf-8")
    if start not in old or end not in old:
        raise ValueError(f"{file.name} has no place for '{name}': it needs {start} and {end}.")
    before, _, rest = old.partition(start)
    file.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def describe_imports(imports: dict) -> str:
    """What importing the package adds, in words."""
    low, high = imports["range"]
    return textwrap.fill(
        f"`import hap_transformers` after `from transformers import Trainer` takes {imports['ratio']:.2f} "
        f"({low:.2f} to {high:.2f}) of the processor time of that alone ({imports['seconds']['trainer']:.1f} s); "
        f"at most {imports['limit']:.2f} is wanted. Medians of processes that took turns.",
        119,
    )


def read(file: Path) -> dict:
    """A JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def grids() -> dict[str, list[dict]]:
    """The study's cells by grid."""
    full, results = PRESETS["full"], HERE / "results"
    found = {name: grid.cells_in(results / "cells.jsonl") for name, grid in full.items()}
    return found | {"longer": full["main"].cells_in(results / "longer_recovery.jsonl")}


def texts(cells_of: dict[str, list[dict]]) -> dict[tuple[Path, str], str]:
    """What belongs between the marks of each file, of the study's cells by grid and of what else was measured."""
    study, speed = HERE / "study.md", HERE / "speed.md"
    found = {}
    for name, cells in cells_of.items():
        tables = [table(cells), differences_table(cells, "hap"), seconds_table(cells)]
        found[study, name] = "\n\n".join(tables[:2] if name == "longer" else tables)
    found[README, "differences"] = differences_table(cells_of["main"], "hap")
    benchmark, latency, pruning = (read(BENCHMARKS / f"{name}.json") for name in ("sensitivity", "latency", "prune"))
    found[speed, "benchmark"] = table_of_ratios(benchmark["rows"]) + "\n\n" + describe(benchmark)
    parts = latency_table(latency["rows"]), describe_latency(latency), multiples_table(latency["multiples"])
    found[speed, "latency"] = "\n\n".join(parts)
    found[speed, "pruning"] = phases_table(pruning["phases"]) + "\n\n" + describe_pruning(pruning)
    found[speed, "imports"] = describe_imports(read(BENCHMARKS / "imports.json"))
    found[HERE / "reliability.md", "figures"] = describe_reliability(read(HERE / "results" / "reliability.json"))
    return found


def draw(cells_of: dict[str, list[dict]]) -> None:
    """Draws the study's pictures."""
    images, main_cells = HERE / "images", cells_of["main"]
    # Random choices fall so far that they flatten all others.
    rivals = [cell for cell in main_cells if cell["method"] != "random"]
    plot_gains(rivals, images / "comparison.png")
    plot_latency(rivals, measure_latencies(rivals, HERE / "results" / "latencies.json"), images / "latency.png")
    plot_kept(main_cells, images / "kept.png")
    plot_gains(cells_of["heads"], images / "heads.png")
    plot_gains(cells_of["parts"], images / "parts.png")


def main() -> None:
    """Writes and draws all of it."""
    cells_of = grids()
    for (file, name), text in texts(cells_of).items():
        write_into(file, name, text)
    draw(cells_of)


if __name__ == "__main__":
    main()
