"""Writes the tables of the README and of `docs/`, and draws the study's pictures, from committed results.

    python -m docs.render_results

Run this command in the checkout's root. `glue_scripts.compare_glue` made `docs/results/*.jsonl`.
The modules of `benchmarks` made `benchmarks/*.json` and `benchmarks/*.jsonl`, `device.json` on a machine with a GPU.
`vision_scripts.compare_cifar` made `benchmarks/cifar.jsonl` and `benchmarks/cifar_precision.json`.
"""

import json
import textwrap
from pathlib import Path

from benchmarks.convnets import convnets_table, describe_convnets
from benchmarks.device_tables import section_text
from benchmarks.embeddings_cells import Key
from benchmarks.embeddings_tables import sections as sections_on_embeddings
from benchmarks.embeddings_tables import summary as summary_of_embeddings
from benchmarks.language import Key as LanguageKey
from benchmarks.language_table import comparison
from benchmarks.language_table import table as perplexity_table
from benchmarks.markdown_table import (
    elimination_table,
    latency_table,
    memory_table,
    multiples_table,
    phases_table,
    promises_table,
    rank_latency_table,
    ranks_table,
    refit_costs_table,
    refit_examples_table,
)
from benchmarks.markdown_table import table as table_of_ratios
from benchmarks.ranks import Key as RanksKey
from benchmarks.ranks_plot import plot_ranks
from benchmarks.speech import Key as SpeechKey
from benchmarks.speech import table as word_errors_table
from benchmarks.whole_classifiers import Key as ClassifiersKey
from benchmarks.whole_model import Key as WholeModelKey
from benchmarks.whole_model_table import classifiers_table, vocabulary_table, whole_model_table, width_table
from benchmarks.whole_road import describe_road, road_table
from glue_scripts.compare_glue.cells import PHASES, read_cells
from glue_scripts.compare_glue.grids import PRESETS, RIVALS, Grid
from glue_scripts.compare_glue.latency import measure_latencies
from glue_scripts.compare_glue.methods import CONTROL, DEFAULT, TUNED
from glue_scripts.compare_glue.plots import plot_gains, plot_kept, plot_latency
from glue_scripts.compare_glue.table import differences_table, recovery_table, seconds_table, table
from vision_scripts.compare_cifar.cells import Key as CifarKey
from vision_scripts.compare_cifar.plot import plot_accuracy
from vision_scripts.compare_cifar.tables import sections as sections_on_cifar


# Tables of a grid; by default all: points over dense, leads, and seconds.
SHOWN = {"longer": 2, "compression": 1, "whole task": 1, "base": 1, "base longer": 1}
# Grids by the model and the recovery that the default had in them.
RECOVERIES = {
    "MiniLM, 100 batches": "compression",
    "MiniLM, 4,210 batches of all of SST-2": "whole task",
    "MPNet-base, 100 batches": "base",
    "MPNet-base, 804 batches": "base longer",
}
WHOLE_TASK = Grid(["sst2"], [TUNED, *RIVALS, CONTROL], [0.9, 0.95], [0])
HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHMARKS = HERE.parent / "benchmarks"


def describe(benchmark: dict) -> str:
    """Says what the benchmark found about rankings."""
    found, machine = benchmark["findings"], benchmark["machine"]
    exact, noisy, spearman = found["gauss_newton"], found["hutchinson"], found["bf16_fp32_spearman"]
    reliability = noisy["reliability"]
    # Spearman-Brown: the odds of the reliability grow in proportion to the number of probes.
    factor = 9 * (1 - reliability) / max(reliability, 1e-3)
    probes, seconds = factor * noisy["probe_batches"], factor * noisy["seconds"]
    outlook = f" By the Spearman-Brown formula, 0.9 would take about {probes:,.0f} probes and {seconds:,.0f} s."
    text = (
        f"MiniLM ran on {machine['threads']} CPU threads ({machine['cpu']}). A batch has 32 MRPC pairs. A measurement "
        f"takes two batches; with Hutchinson, it takes one batch and four probes. `make benchmark` ran "
        f"{benchmark['settings']['repeats']} rounds; the table has their medians and ranges. Memory is that of "
        f"tensors, beyond the model and the data. One Gauss-Newton pass over {found['examples']} training pairs of "
        f"the fine-tuned model ranks heads with reliability {exact['fp32']['reliability']:.3f} in "
        f"{exact['fp32']['seconds']:.0f} s; in bf16, with reliability {exact['bf16']['reliability']:.3f} in "
        f"{exact['bf16']['seconds']:.0f} s. The rank correlation of bf16 with fp32 scores is {spearman['heads']:.4f} "
        f"for heads and {spearman['neurons']:.4f} for neurons. Hutchinson in bf16 reaches "
        f"reliability {reliability:.2f} with {noisy['probe_batches']} probes of a batch in {noisy['seconds']:.0f} s."
        f"{'' if noisy['reached_0.9'] else outlook} The rank correlation of Hutchinson with Gauss-Newton is "
        f"{noisy['spearman_to_gauss_newton']:.2f}. Noise lowers it, and so do the terms of the Hessian that the "
        f"Gauss-Newton matrix lacks."
    )
    return textwrap.fill(text, 119)


def describe_latency(latency: dict) -> str:
    """Says how to read the table of latencies."""
    text = (
        "The table has the time of a forward pass over that of the dense model in the same round, with quartiles over "
        "rounds. The percentage is the share of the ideal speed-up that is reached; ideal is the speed-up of the "
        "FLOPs. Every layer loses the same share of its FLOPs, in heads and in neurons. Models have the shapes of "
        f"MiniLM and BERT-base. `make benchmark` ran on {latency['machine']['threads']} CPU threads "
        f"({latency['machine']['cpu']}). The overhead of operations, not their FLOPs, limits small batches in bf16."
    )
    return textwrap.fill(text, 119)


def describe_pruning(pruning: dict) -> str:
    """Says how to read the table of pruning's phases."""
    settings, machine = pruning["settings"], pruning["machine"]
    layers, examples = (row["ratio"] for row in pruning["rows"][:2])
    twice = "Twice the layers take {:.2f} times as long. Twice the examples take {:.2f} times as long."
    text = (
        f"Each phase ran on {settings['examples']} MRPC pairs in batches of 32, in float32, on {machine['threads']} "
        f"CPU threads ({machine['cpu']}). Pruning removed {settings['ratio']:.0%} of the encoder. `make benchmark` "
        f"ran {settings['repeats']} rounds, and one of BERT-base, which has random weights; the table has medians. "
        + twice.format(2 * layers, 2 * examples)
    )
    return textwrap.fill(text, 119)


def describe_reliability(figures: dict) -> str:
    """Says what the long form of the reliability tests has tried."""
    phases: dict[str, int] = {}
    for killed in (figures["killed"], figures["killed_with_checkpoints"]):
        for phase, count in killed.items():
            phases[phase] = phases.get(phase, 0) + count
    text = (
        f"The last `make test-reliability` killed {sum(phases.values())} runs of the main job. By the files they "
        f"left, they were in these phases: {', '.join(f'{phase} {count}' for phase, count in phases.items())}. "
        f"Recovery without checkpoints leaves no file, and counts as pruning. The tests tried "
        f"{figures['wrong_inputs']} wrong inputs, apart from the scripts' flags. "
        f"They loaded five kinds of mutated files, {figures['fuzzed']:,} times "
        f"each. They ran {figures['rounds']} rounds of scoring, pruning and reloading; memory grew by "
        f"{figures['grown']} MiB in the last two thirds of these. All tests passed."
    )
    return textwrap.fill(text, 119)


def write_into(file: Path, name: str, text: str) -> None:
    """Replaces the text between `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = file.read_text(encoding="utf-8")
    if start not in old or end not in old:
        raise ValueError(f"{file.name} has no place for '{name}': it needs {start} and {end}.")
    before, _, rest = old.partition(start)
    file.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def describe_imports(imports: dict) -> str:
    """Says what importing the package adds."""
    low, high = imports["range"]
    return textwrap.fill(
        f"`from transformers import Trainer` takes {imports['seconds']['trainer']:.1f} s of processor time. With "
        f"`import hap_transformers` after it, it takes {imports['ratio']:.2f} times as much ({low:.2f} to "
        f"{high:.2f}); the target is at most {imports['limit']:.2f}. These are medians of processes that took turns.",
        119,
    )


def describe_elimination(elimination: dict) -> str:
    """Says how to read the table of eliminations."""
    settings = elimination["settings"]
    return textwrap.fill(
        f"MiniLM was fine-tuned on {settings['train_examples']:,} sentences of SST-2, then scored and refitted on "
        f"{settings['seeds']} samples of {settings['examples']} others. Seconds are the processor's, in all "
        "eliminations of a scoring run. The rank correlation is that of the neurons' order of removal with the one of "
        "single removals. KL is the divergence of the refitted model's predictions from the dense model's on the "
        "validation set. The table has medians, and the range of the ratio of KL. The library removes 1 / 128.",
        119,
    )


def describe_memory(memory: dict) -> str:
    """Says how to read the table of peak memory."""
    settings, machine = memory["settings"], memory["machine"]
    ends = ", ".join(f"{name} billion" for name in settings["ends_only"])
    least = {row["billions"]: row["least"] / 1e9 for row in memory["rows"]}
    above = [row for row in memory["rows"] if row["target"] and row["peak"] > row["target"]]
    missed = " and ".join(f"`{row['job']}` at {row['billions']} billion" for row in above)
    threads = f"{machine['threads']} CPU thread{'' if machine['threads'] == 1 else 's'}"
    text = (
        "Models are Llama shapes in float32 with random weights. Each job ran in a process of its own, on "
        f"{threads}, with {settings['batches']} texts of {settings['tokens']} tokens. Measured is the largest "
        "resident set of the process, less that from before the model was made. `pass` is forward+backward of one "
        "text. `score` is `kronecker` with `max_memory` as large as the model. Its formula is the model, 8 (n² + d²) "
        "bytes for every output projection that is scored in one part (n inputs, d outputs), and 48 n² for the "
        "elimination of one projection. With a smaller `max_memory`, layers are scored one by one; by the formula, "
        f"that takes {least['8']:.0f} GB at 8 billion and {least['70']:.0f} GB at 70 billion parameters. `refit` is "
        f"surgery and refit after a plan that removes {settings['ratio']:.0%} of the encoder. Its formula is the "
        "dense model, the pruned one, 8 (n² + n d) bytes, and four copies of the residual stream, 16 d bytes a token. "
        "The formulas leave out the activations of a pass and what the allocator keeps. The target is twice the model "
        f"with the activations of a pass.{f' It is missed by {missed}.' if missed else ''} At {ends} parameters, "
        "costs of removal were computed for the first and the last layer only; those of the others take as much "
        "memory."
    )
    return textwrap.fill(text, 119)


def describe_refit(refit: dict) -> str:
    """Says how to read the tables of refits."""
    settings, machine = refit["settings"], refit["machine"]
    few, many = settings["costs_of"]
    seeds = "of one seed" if settings["seeds"] == 1 else f"medians of {settings['seeds']} seeds"
    threads = f"{machine['threads']} CPU thread{'' if machine['threads'] == 1 else 's'}"
    return textwrap.fill(
        "MiniLM was fine-tuned on a part of each task's training split, scored on 1,024 of its examples and refitted "
        "without any training. KL is the divergence of its predictions from the dense model's on the part that was "
        "held out; other columns have the KL over that after 1,024 examples, and the processor's seconds of the "
        f"refit. Figures are {seeds}. The second table compares {many:,} with {few:,} "
        f"texts of {settings['tokens']} tokens, each in a process of its own on {threads}; it has medians of "
        f"{settings['repeats']} rounds.",
        119,
    )


def describe_refit_precision(refit: dict) -> str:
    """Says how to read the table of refits in bfloat16."""
    settings, threads = refit["settings"], refit["threads"]
    return textwrap.fill(
        f"Each line has bfloat16 over float32. Plans by magnitude removed {settings['ratio']:.0%} of the encoder. "
        f"MiniLM was refitted and tuned on {settings['examples']} MRPC pairs without any training, a model of "
        f"BERT-base's size with random weights on {settings['base_examples']}. Seconds are the processor's, on "
        f"{threads} CPU thread{'' if threads == 1 else 's'}. Distance is the relative squared distance of the last "
        f"hidden states from the dense model's, on as many unseen pairs. The table has medians of "
        f"{settings['repeats']} rounds, and ranges.",
        119,
    )


def describe_device(file: Path) -> str:
    """Formats what `benchmarks.device` found on a GPU.

    Raises:
        ValueError: If the file is of small models on a processor.
    """
    if not file.exists():
        return "These figures are open: `make benchmark-device` makes them on a machine with a GPU, in nine minutes."
    results = read(file)
    if results["settings"]["small"]:
        raise ValueError(f"'{file}' is of `--small`, whose figures say nothing; remove it.")
    return "\n".join(section_text(name, found) for name, found in results["sections"].items()).rstrip()


def read(file: Path) -> dict:
    """Reads a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def grids() -> dict[str, list[dict]]:
    """Reads the study's cells, by grid."""
    full, results = PRESETS["full"], HERE / "results"
    found = {name: grid.cells_in(results / "cells.jsonl") for name, grid in full.items()}
    high = (grid.cells_in(results / "compression.jsonl") for grid in PRESETS["compression"].values())
    longer = full["main"].cells_in(results / "longer_recovery.jsonl")
    names = {"base": "base.jsonl", "base longer": "base_longer.jsonl"}
    base = {name: PRESETS["base"]["base"].cells_in(results / file) for name, file in names.items()}
    found |= {"longer": longer, "compression": [cell for cells in high for cell in cells]}
    return found | {"whole task": WHOLE_TASK.cells_in(results / "whole_task.jsonl")} | base


def texts(cells_of: dict[str, list[dict]]) -> dict[tuple[Path, str], str]:
    """Makes the text between each pair of marks, from the study's cells by grid and from the other results."""
    study, speed = HERE / "study.md", HERE / "speed.md"
    found = {}
    for name, cells in cells_of.items():
        tables = [table(cells), differences_table(cells, DEFAULT), seconds_table(cells)]
        found[study, name] = "\n\n".join(tables[: SHOWN.get(name)])
    found[study, "recovery"] = recovery_table({row: cells_of[name] for row, name in RECOVERIES.items()}, TUNED)
    for name in ("compression", "base"):
        found[README, name] = "\n\n".join(differences_table(cells_of[name], TUNED, phase) for phase in PHASES)
    found[README, "differences"] = differences_table(cells_of["main"], DEFAULT)
    benchmark, latency, pruning = (read(BENCHMARKS / f"{name}.json") for name in ("sensitivity", "latency", "prune"))
    found[speed, "benchmark"] = table_of_ratios(benchmark["rows"]) + "\n\n" + describe(benchmark)
    parts = latency_table(latency["rows"]), describe_latency(latency), multiples_table(latency["multiples"])
    found[speed, "latency"] = "\n\n".join(parts)
    found[speed, "promises"] = promises_table(latency["promises"])
    parts = [phases_table(pruning["phases"]), describe_pruning(pruning)]
    if others := pruning["rows"][2:]:
        parts.append(table_of_ratios(others))
    found[speed, "pruning"] = "\n\n".join(parts)
    elimination = read(BENCHMARKS / "elimination.json")
    found[speed, "elimination"] = elimination_table(elimination["runs"]) + "\n\n" + describe_elimination(elimination)
    memory = read(BENCHMARKS / "memory.json")
    found[speed, "memory"] = memory_table(memory["rows"]) + "\n\n" + describe_memory(memory)
    refit = read(BENCHMARKS / "refit.json")
    tables = refit_examples_table(refit["rows"]), refit_costs_table(refit["costs"]), describe_refit(refit)
    found[speed, "refit"] = "\n\n".join(tables)
    low = read(BENCHMARKS / "refit_precision.json")
    found[speed, "refit precision"] = table_of_ratios(low["rows"]) + "\n\n" + describe_refit_precision(low)
    convnets, road = read(BENCHMARKS / "convnets.json"), read(BENCHMARKS / "whole_road.json")
    found[speed, "convnets"] = f"{convnets_table(convnets)}\n\n{textwrap.fill(describe_convnets(convnets), 119)}"
    found[speed, "road"] = f"{road_table(road)}\n\n{textwrap.fill(describe_road(road), 119)}"
    found[speed, "device"] = describe_device(BENCHMARKS / "device.json")
    found[speed, "imports"] = describe_imports(read(BENCHMARKS / "imports.json"))
    encoders = read_cells(BENCHMARKS / "embeddings.jsonl", Key)
    found[README, "encoders"] = summary_of_embeddings(encoders)
    for name, text in sections_on_embeddings(encoders).items():
        found[HERE / "embeddings.md", name] = text
    found[HERE / "how_to" / "seq2seq.md", "word errors"] = word_errors_table(
        read_cells(BENCHMARKS / "speech.jsonl", SpeechKey)
    )
    language = read_cells(BENCHMARKS / "language.jsonl", LanguageKey)
    found[HERE / "language.md", "perplexity"], found[README, "language"] = (
        perplexity_table(language),
        comparison(language),
    )
    ranks = read_cells(BENCHMARKS / "ranks.jsonl", RanksKey)
    found[HERE / "ranks.md", "ranks"] = ranks_table(list(ranks.values()))
    found[HERE / "ranks.md", "rank latency"] = rank_latency_table(read(BENCHMARKS / "rank_latency.json")["rows"])
    of_whole_model = read_cells(BENCHMARKS / "whole_model.jsonl", WholeModelKey)
    found[HERE / "whole_model.md", "whole model"] = whole_model_table(list(of_whole_model.values()))
    classifiers = read_cells(BENCHMARKS / "whole_classifiers.jsonl", ClassifiersKey)
    found[HERE / "whole_model.md", "classifiers"] = classifiers_table(list(classifiers.values()))
    found[HERE / "whole_model.md", "vocabulary"] = vocabulary_table(read(BENCHMARKS / "vocabulary.json"))
    found[HERE / "whole_model.md", "width"] = width_table(read(BENCHMARKS / "residual_width.json"))
    cifar, precision = read_cells(BENCHMARKS / "cifar.jsonl", CifarKey), read(BENCHMARKS / "cifar_precision.json")
    for name, text in sections_on_cifar(cifar, precision).items():
        found[HERE / "cifar.md", name] = text
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
    plot_gains(cells_of["base"], images / "base.png")
    plot_gains(cells_of["heads"], images / "heads.png")
    plot_gains(cells_of["parts"], images / "parts.png")
    plot_ranks(list(read_cells(BENCHMARKS / "ranks.jsonl", RanksKey).values()), images / "ranks.png")
    cifar = read_cells(BENCHMARKS / "cifar.jsonl", CifarKey)
    plot_accuracy([cell for key, cell in cifar.items() if not key.recovery_epochs], images / "cifar.png")


def main() -> None:
    """Writes all tables and draws all pictures."""
    cells_of = grids()
    for (file, name), text in texts(cells_of).items():
        write_into(file, name, text)
    draw(cells_of)


if __name__ == "__main__":
    main()
