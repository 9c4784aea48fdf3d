"""The page of a run says what the run's files say, and works in a browser without any network."""

import html
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from tiny import make_batch, make_model
from typer.testing import CliRunner

from hap_transformers import PruningPlan, estimate_sensitivity
from hap_transformers.cli import app
from hap_transformers.reporting.page import score_cells, write_report
from hap_transformers.reporting.results import results_table


needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")) and not os.environ.get("HAP_REQUIRE_CHROMIUM"),
    reason="chromium and chromedriver are not installed",
)


@pytest.fixture
def run(tmp_path):
    """The files of a run, by hand."""
    folder = tmp_path / "a <b> run"
    folder.mkdir()
    model = make_model(dtype=torch.float32)
    scores = estimate_sensitivity(model, [make_batch(8), make_batch(8, seed=1)], "gauss_newton_trace", progress=False)
    scores.save(folder / "sensitivity.safetensors")
    plan = PruningPlan.for_model(model, heads={0: [1, 2]}, neurons={1: range(16)}, implants={1: 4})
    plan.save(folder / "pruning_plan.json")
    metrics = {"dense": 0.91, "pruned": 0.85, "recovered": 0.905}
    results = {
        "task": "sst2",
        "model": "me/<script>alert(1)</script>",
        "metrics": {phase: {"loss": 0.3, "accuracy": value} for phase, value in metrics.items()},
        "intervals": {"dense": {"accuracy": [0.89, 0.928]}, "pruned": {}, "recovered": {"accuracy": [0.88, 0.92]}},
        "num_examples": {"train": 100, "validation": 872},
        "components": {"heads": {"dense": 8, "pruned": 6}, "neurons": {"dense": 48, "pruned": 36}},
        "parameters": {"dense": 10_000, "pruned": 7_500},
        "encoder_parameters": {"dense": 5_000, "pruned": 2_500},
        "flops": {"dense": 4e9, "pruned": 3e9},
        "latency_ms": {"dense": 20.0, "pruned": 15.0},
        "bytes": {"dense": 40_000, "pruned": 30_000},
        "batch": [32, 20],
        "reliability": 0.9,
        "seconds": {"fine-tune": 1.0},
        "seed": 42,
        "hap_config": {"ratio": 0.25, "budget": "params", "method": "gauss_newton_trace"},
        "training": {"learning_rate": 5e-5},
        "versions": {"torch": "2"},
        "history": {
            "fine-tune": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.35}, {"step": 2, "train_loss": 0.5}]
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder, results, plan, scores


class Cells(HTMLParser):
    """Collects the text of table cells, and all tags with attributes."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None


def test_the_page_says_what_the_files_say(run):
    folder, results, plan, scores = run
    printed = CliRunner().invoke(app, ["report", str(folder), "--json"])
    page = write_report(folder)
    assert json.loads(printed.stdout) == {"file": str(page)} and page == folder / "report.html"
    text = page.read_text()
    cells = Cells(text)
    rows = {row[0]: row[1:] for row in cells.rows}
    assert list(rows).index("accuracy") < list(rows).index("loss")
    assert rows["accuracy"][0].startswith("0.9100 (0.890 to 0.928)") and rows["loss"] == ["0.3000"] * 3
    assert rows["parameters"] == ["10,000", "7,500", "75%"]
    assert rows["of these in the encoder"] == ["5,000", "2,500", "50%"]
    assert rows["size on disk"] == ["0.0 MB", "0.0 MB", "75%"]
    assert ["0", "2 of 4", "", "24 of 24", "", ""] in cells.rows and [
        "1",
        "4 of 4",
        "",
        "8 of 24",
        "",
        "4",
    ] in cells.rows
    details = [attributes["data-detail"] for tag, attributes in cells.tags if "data-detail" in attributes]
    assert len(details) == 8 and sum(detail.endswith("removed") for detail in details) == 2
    first = float(scores.heads[0][1])
    error = first * float(scores.stderr["heads"][0][1] / scores.traces["heads"][0][1])
    assert details[1] == f"layer 0, head 1: {first:.3g} ± {error:.2g}, removed"
    points = next(attributes["points"] for tag, attributes in cells.tags if tag == "polyline")
    assert points == "0.0,0.0 280.0,120.0"


def test_nothing_is_fetched_and_nothing_from_the_files_runs(run):
    text = write_report(run[0]).read_text()
    assert "<script>alert" not in text and "me/&lt;script&gt;" in text and "a &lt;b&gt; run" in text
    for tag, attributes in Cells(text).tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:,") == "data:,", tag
    assert not re.search(r"url\(|@import|https?://", text)


def test_structure_for_screen_readers(run):
    cells = Cells(write_report(run[0]).read_text())
    tags = [tag for tag, _ in cells.tags]
    assert dict(cells.tags)["html"]["lang"] == "en" and tags.count("h1") == 1 and tags.count("main") == 1
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in cells.tags if tag == "th")
    assert all("aria-label" in attributes for tag, attributes in cells.tags if tag == "svg")


def test_phases_with_other_metrics(run):
    """Results of a release without intervals, and a metric of the last phase alone."""
    folder, results, _, _ = run
    metrics = {**results["metrics"], "recovered": {"loss": 0.2, "accuracy": 0.9, "test_accuracy": 0.88}}
    old = {name: value for name, value in results.items() if name != "intervals"}
    (folder / "results.json").write_text(json.dumps({**old, "metrics": metrics}))
    text = write_report(folder).read_text()
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    assert rows["test_accuracy"] == ["", "", "0.8800"] and rows["accuracy"] == ["0.9100", "0.8500", "0.9000"]
    assert "bootstrap" not in text and "95 % bootstrap intervals" in render(run)


@pytest.mark.parametrize("pruned, warned", [(20.2, True), (19.1, True), (19.0, False), (8.0, False)])
def test_a_model_that_is_no_faster_is_warned_of(run, pruned, warned):
    run[1]["latency_ms"] = {"dense": 20.0, "pruned": pruned}
    warning = f"is not faster on the device of this run: a batch of 32 x 20 takes {pruned / 20:.0%} of the dense"
    text = html.unescape(render(run))
    assert (warning in text) == ("Plan with budget='latency'" in text) == warned
    assert (warning in results_table(run[1])) == warned
    run[1]["device"] = "NVIDIA H100"
    assert ("is not faster on NVIDIA H100: a batch" in render(run)) == warned
    del run[1]["latency_ms"]  # Results of older runs.
    assert "is not faster" not in render(run)


def render(run):
    folder, results, _, _ = run
    (folder / "results.json").write_text(json.dumps(results))
    return write_report(folder).read_text()


def test_the_table_for_the_terminal(run):
    _, results, _, _ = run
    metrics = {**results["metrics"], "recovered": {"loss": 0.2, "accuracy": 0.9, "test_accuracy": 0.88}}
    table = results_table({**results, "metrics": metrics})
    lines = table.splitlines()
    assert lines[2].split()[:3] == ["accuracy", "test_accuracy", "loss"]
    assert lines[4].split()[:6] == ["dense", "0.9100", "(0.890", "to", "0.928)", "0.3000"]
    assert "recovered  0.9000 (0.880 to 0.920)" in table and "Brackets are 95 % bootstrap intervals" in table
    assert len({len(line) for line in lines[2:7]}) == 1


def test_a_file_of_results_that_is_no_json(run):
    (run[0] / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json' is not JSON: Expecting"):
        write_report(run[0])


def test_heads_without_errors_or_with_scores_of_zero(run):
    _, _, plan, scores = run
    scores.traces, scores.stderr = {}, {}
    scores.heads[0][0] = 0.0
    cells = score_cells("heads", scores, plan)
    assert cells[0][0]["shade"] == 0 and all(cell["error"] is None for row in cells for cell in row)
    assert max(cell["shade"] for row in cells for cell in row) == 1


@pytest.mark.parametrize("name", ["results.json", "pruning_plan.json", "sensitivity.safetensors"])
def test_folders_that_are_no_run(run, name):
    folder = run[0]
    (folder / name).write_text('{"task": 1}')
    with pytest.raises(ValueError, match=name):
        write_report(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}; it is no output folder"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@needs_chromium
@pytest.mark.any_release
def test_in_a_browser(run, tmp_path):
    """Loads without errors or requests, shows a head by mouse and keyboard, copies, fits a phone, goes dark."""
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    page = write_report(run[0])
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(page.as_uri())
        assert driver.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = {
            request["request"]["url"] for request in sent if request["documentURL"] == page.as_uri()
        }  # Not the empty tab's.
        assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
        cells = driver.find_elements(By.CSS_SELECTOR, "[data-detail]")
        detail = driver.find_element(By.ID, "detail")
        ActionChains(driver).move_to_element(cells[1]).perform()
        assert detail.text == cells[1].get_attribute("data-detail")
        driver.execute_script("arguments[0].focus()", cells[5])
        assert detail.text == cells[5].get_attribute("data-detail")
        driver.find_element(By.ID, "copy").click()
        copied = driver.find_element(By.ID, "copied")
        WebDriverWait(driver, 5).until(lambda _: copied.text == "Copied.")
        light = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") != light
        phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        driver.save_screenshot(str(tmp_path / "phone.png"))
    finally:
        driver.quit()
