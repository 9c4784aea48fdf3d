"""The grids of the comparison, and the tables of its cells."""

import csv

import numpy as np
import pytest
from scipy.stats import norm

from glue_scripts.compare_glue.base_models import MINILM
from glue_scripts.compare_glue.cells import shared, write_csv
from glue_scripts.compare_glue.grids import PRESETS, Grid
from glue_scripts.compare_glue.methods import CONTROL, DEFAULT
from glue_scripts.compare_glue.plots import COLOURS, plot_gains, plot_kept
from glue_scripts.compare_glue.table import differences, differences_table, recovery_table, seconds_table, table


pytestmark = pytest.mark.any_release


def make_cell(method=DEFAULT, task="mrpc", ratio=0.6, seed=0, dense=0.8, pruned=0.7, recovered=0.75):
    cell = {
        "model": MINILM,
        "task": task,
        "method": method,
        "budget": "params",
        "ratio": ratio,
        "seed": seed,
        "fold": False,
    }
    for phase, value in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
        cell[phase] = {"loss": 1.0, "accuracy": value}
    kept = {"heads": [2, 1], "neurons": [16, 8], "implants": [0, 0], "parameters": {"dense": 100, "pruned": 40}}
    return {**cell, "seconds": {"score": 3.0, "prune": 2.0, "recover": 1.0}, **kept}


def test_table_of_means_over_seeds_and_tasks():
    cells = [
        make_cell(task=task, seed=seed, recovered=accuracy)
        for task, values in (("mrpc", (0.79, 0.77)), ("sst2", (0.81, 0.81)))
        for seed, accuracy in enumerate(values)
    ]
    control = [make_cell(CONTROL, task=task, ratio=0, recovered=0.82) for task in ("mrpc", "sst2")]
    header, _, dense, *_, default, nothing = table(cells + control).splitlines()
    assert header == "| dense models, x 100 | mrpc accuracy | sst2 accuracy |"
    assert dense == "| the dense model | 80.0 ± 0.0 | 80.0 ± 0.0 |"
    assert default == f"| {DEFAULT} | -2.0 ± 1.4 | +1.0 ± 0.0 | -0.5 |"
    assert nothing == f"| {CONTROL} | +2.0 [1] | +2.0 [1] | +2.0 |"


def test_the_control_alone_has_tables_and_pictures(tmp_path):
    cells = [make_cell(CONTROL, ratio=0, pruned=0.8)]
    assert "| nothing removed | 0.0 |" in table(cells).splitlines()
    for name, plot in (("gains", plot_gains), ("kept", plot_kept)):
        plot(cells, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()


def test_differences_are_paired():
    dense = (0.8, 0.9, 0.7)  # Seeds differ far more than methods.
    cells = [make_cell(seed=seed, dense=d, recovered=d - 0.01) for seed, d in enumerate(dense)]
    behind = (0.02, 0.03, 0.04)
    cells += [
        make_cell("gradient", seed=seed, dense=d, recovered=d - lost)
        for seed, (d, lost) in enumerate(zip(dense, behind, strict=True))
    ]
    dense, row = differences(cells, DEFAULT)
    assert dense == {"other": "the dense model", "ratio": 0.6, "pairs": 3, "mean": pytest.approx(-1.0)}
    assert row == {"other": "gradient", "ratio": 0.6, "pairs": 3, "mean": pytest.approx(2.0)}  # Too few to resample.
    assert differences_table(cells, DEFAULT).splitlines()[-1] == "| over gradient | +2.0 |"
    cells.append(make_cell(CONTROL, ratio=0, dense=0.8, pruned=0.8, recovered=0.77))
    assert differences_table(cells, DEFAULT).splitlines()[-1] == "| over nothing removed | +2.0 [1] |"
    assert differences_table(cells, DEFAULT, "pruned").splitlines()[-1] == "| over gradient | 0.0 |"


def test_a_recovery_is_told_by_its_two_ends():
    few = [make_cell(pruned=0.78, recovered=0.81), make_cell(seed=1, pruned=0.76, recovered=0.79)]
    others = [make_cell("gradient", pruned=0.1, recovered=0.1), make_cell(CONTROL, ratio=0)]
    more = [make_cell(ratio=0.9, dense=0.9, pruned=0.7, recovered=0.85)]
    _, _, short, long = recovery_table({"short": few + others, "long": more}, DEFAULT).splitlines()
    assert short == "| short | -3.0 to 0.0 [2] |  |"
    assert long == "| long |  | -20.0 to -5.0 [1] |"


def test_cells_without_recovery_are_told_before_it_only():
    without = make_cell(seed=1, pruned=0.78)
    del without["recovered"], without["seconds"]["recover"]
    cells = [make_cell(pruned=0.76, recovered=0.79), without]
    *_, pruned, _, _, _, recovered = table(cells).splitlines()
    assert pruned == f"| {DEFAULT} | -3.0 ± 1.4 |" and recovered == f"| {DEFAULT} | -1.0 [1] |"
    assert recovery_table({"short": cells}, DEFAULT).splitlines()[-1] == "| short | -4.0 to -1.0 [1] |"
    assert differences_table(cells, DEFAULT).splitlines()[-1] == "| over the dense model | -1.0 |"
    assert seconds_table(cells).splitlines()[-1] == f"| {DEFAULT} | 3 + 2 + 1 |"
    assert [len(text.splitlines()) for text in table([without]).split("\n\n")] == [3, 3]


def test_what_rounds_to_zero_has_no_sign():
    cells = [make_cell(recovered=0.8), make_cell("gradient", recovered=0.8002)]
    assert differences_table(cells, DEFAULT).splitlines()[-2:] == [
        "| over the dense model | 0.0 |",
        "| over gradient | 0.0 |",
    ]


def test_means_over_cells_are_of_what_all_methods_have():
    cells = [make_cell(), make_cell("gradient"), make_cell(CONTROL, ratio=0)]
    lonely = {**make_cell(task="sst2"), "seconds": {"score": 99.0, "prune": 99.0, "recover": 99.0}}
    assert shared([*cells, lonely]) == cells[:2]
    assert seconds_table([*cells, lonely]).splitlines() == [
        "| seconds: score + prune + recover | 60% |",
        "| --- | --- |",
        f"| {DEFAULT} | 3 + 2 + 1 |",
        "| gradient | 3 + 2 + 1 |",
    ]


def test_intervals_are_those_of_the_mean_of_pairs():
    values = np.random.default_rng(0).normal(1.0, 2.0, 40)
    cells = [make_cell(seed=seed, dense=0.5, recovered=0.5) for seed in range(40)]
    cells += [
        make_cell("gradient", seed=seed, dense=0.5, recovered=0.5 - value / 100) for seed, value in enumerate(values)
    ]
    row = differences(cells, DEFAULT)[-1]
    # The normal interval of a mean; that of a percentile bootstrap comes near it with so many pairs.
    low, high = norm.interval(0.95, values.mean(), values.std(ddof=1) / 40**0.5)
    assert row["low"] == pytest.approx(low, abs=0.1) and row["high"] == pytest.approx(high, abs=0.1)


def test_cells_of_several_budgets_share_no_table():
    with pytest.raises(ValueError, match="several models, budgets or folds"):
        table([make_cell(), {**make_cell(), "budget": "heads"}])


def test_cells_of_several_dense_models_share_no_table():
    with pytest.raises(ValueError, match="seed 0, start from several dense models"):
        table([make_cell(), make_cell("gradient", dense=0.7)])


def test_csv_has_a_row_a_cell(tmp_path):
    write_csv([make_cell(), make_cell("gradient", recovered=0.5)], tmp_path / "cells.csv")
    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    found = [(row["method"], row["recovered.accuracy"], row["heads"]) for row in rows]
    assert found == [(DEFAULT, "0.75", "[2, 1]"), ("gradient", "0.5", "[2, 1]")]


@pytest.mark.parametrize("grid", [grid for grids in PRESETS.values() for grid in grids.values()])
def test_a_preset_has_a_colour_for_every_method(grid):
    assert len(grid.methods) <= len(set(COLOURS))


def test_presets_ask_for_known_cells():
    keys = {name: [key for grid in grids.values() for key in grid.keys()] for name, grids in PRESETS.items()}
    # Main: 4 tasks x 3 seeds x (5 methods x 3 ratios + what recovery alone does); heads: 3 methods; parts: 11.
    assert len(keys["full"]) == 4 * 3 * (5 * 3 + 1) + 4 * 3 * 3 * 3 + 2 * 2 * 11 * 2
    with pytest.raises(ValueError, match="between 0 and 1, got .60"):
        Grid(["mrpc"], [DEFAULT], [60.0], [0])
    with pytest.raises(ValueError, match="not by budget 'latency'"):
        Grid(["mrpc"], [DEFAULT], [0.6], [0], "latency")
