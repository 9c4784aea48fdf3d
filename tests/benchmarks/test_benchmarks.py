"""The benchmarks: their contenders run, and their measures are right."""

import json

import pytest
import torch
from tiny import GLUE, make_batch, make_model, needs_glue
from transformers import BertConfig, BertModel

from benchmarks import latency, markdown_table, prune, rank_latency, workloads
from hap_transformers.efficiency import count_flops


def test_peak_memory_counts_what_is_there_at_once():
    def contender():
        for _ in range(3):
            first = torch.zeros(2**20)
            second = torch.zeros(2**19)
            del first, second

    assert workloads.peak_memory(contender) == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_contenders(precision):
    model, batches = make_model(dtype=torch.float32), [make_batch()]
    workloads.forward_backward(model, batches, precision)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert workloads.gauss_newton(model, batches, precision).num_probes == 0
    assert workloads.hutchinson(model, batches, precision).num_probes == workloads.PROBES


@needs_glue
@pytest.mark.parametrize("num_labels", [2, 3])
def test_batches_of_mrpc(num_labels):
    batches = workloads.load_batches(str(GLUE), 2, num_labels)
    assert [len(batch["input_ids"]) for batch in batches] == [workloads.BATCH_SIZE] * 2
    assert set(batches[0]["labels"].tolist()) == set(range(num_labels))


def test_the_peer():
    pytest.importorskip("pyhessian", reason="pyhessian is not installed")
    assert workloads.pyhessian(make_model(dtype=torch.float32), [make_batch()]) > 0


def test_table():
    row = {"measure": "a / b", "target": 0.9, "ratio": 0.5, "smallest": 0.4, "largest": 0.6}
    text = markdown_table.table([{**row, "values": [1.0, 2.0], "unit": "s"}])
    assert text.splitlines()[-1] == "| a / b | 0.50 (0.40 to 0.60) | 0.90 | 1.00 / 2.00 s |"


@pytest.mark.parametrize("share", latency.SHARES)
def test_the_share_of_flops_asked_for_is_removed(share):
    model = BertModel(BertConfig(hidden_size=48, num_attention_heads=12, num_hidden_layers=2, intermediate_size=400))
    inputs = latency.make_inputs(2, 16)
    smaller = latency.pruned(model, inputs, share, multiple=1)
    pooler = 2 * 2 * 48 * 48
    costs = [count_flops(m, inputs) - pooler for m in (model, smaller)]
    assert costs[1] / costs[0] == pytest.approx(1 - share, abs=0.003)
    assert latency.pruned(model, inputs, share).encoder.layer[1].output.dense.in_features % 16 == 0


def test_latency_tables():
    row = {"model": "tiny", "dtype": "float32", "batch_size": 1, "length": 8, "dense_ms": 12.3, "rounds": 5}
    ratio = {"time": 0.5, "lower": 0.4, "upper": 0.6}
    text = markdown_table.latency_table([{**row, **ratio, "share": 0.6, "flops": 0.4}])
    assert text.splitlines()[0] == "| model | numbers | batch | dense | 60% removed |"
    assert text.splitlines()[2] == "| tiny | float32 | 1 x 8 | 12 ms | 0.50 (0.40 to 0.60), 80% |"
    assert latency.ratios([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == {"time": 1.0, "lower": 0.75, "upper": 1.25}
    text = markdown_table.multiples_table([{"neurons": 613, "dtype": "float32", **ratio}])
    assert text.splitlines()[-1] == "| 613 | float32 | 0.500 (0.400 to 0.600) |"


def test_promises_are_compared_with_what_was_measured(monkeypatch):
    """A clock that says half of the dense model's seconds for every pruned model."""
    monkeypatch.setattr(latency, "PROMISED_BATCHES", ((2, 8),))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64}
    monkeypatch.setattr(latency, "MODELS", {"MiniLM": sizes})
    monkeypatch.setattr(
        latency, "compare_latency", lambda models, inputs, repeats, mode: {"dense": 2.0, "pruned": 1.0}
    )
    with torch.inference_mode():
        rows = latency.measure_promises(latency.Arguments(seconds=0.1))
    assert [row["share"] for row in rows] == [0.4, 0.6, 0.8]
    for row in rows:
        assert row["measured"] == 0.5 and row["error"] == pytest.approx(2 * row["promised"] - 1)
        assert 0 < row["promised"] < 1
    text = markdown_table.promises_table([{**rows[0], "promised": 0.6, "error": 0.2}])
    assert text.splitlines()[-1] == "| MiniLM | 2 x 8 | 40% | 0.600 | 0.500 | +20.0% |"


def test_both_ways_are_timed_at_equal_parameters(monkeypatch, tmp_path):
    assert rank_latency.MODELS["BERT-base, 4 layers"]["hidden_size"] == 768
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 384}
    monkeypatch.setattr(rank_latency, "MODELS", {"tiny": sizes})
    monkeypatch.setattr(rank_latency, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(rank_latency, "LENGTHS", (4, 8))
    output, threads = tmp_path / "rank_latency.json", torch.get_num_threads()
    arguments = f"rank_latency --output {output} --seconds 0 --threads 1 --models tiny"
    monkeypatch.setattr("sys.argv", arguments.split())
    rank_latency.main()
    torch.set_num_threads(threads)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 4 * len(rank_latency.SHARES) * 2
    for row in rows:
        assert row["kept"] == pytest.approx(1 - row["share"], abs=0.05) and row["time"] > 0
    assert "| tiny | float32 | 1 x 4 | " in markdown_table.rank_latency_table(rows)


def test_phases_of_pruning():
    model, batch = make_model(dtype=torch.float32), make_batch()
    before = count_flops(model, batch)
    runs = [prune.prune(model, [batch], 0.5, kinds) for kinds in (prune.DIMENSIONS, prune.WHOLE_HEADS)]
    assert tuple(runs[0]) == prune.PHASES and min(runs[0].values()) > 0 and count_flops(model, batch) == before
    assert runs[1]["align"] < runs[0]["align"]
    (passes,) = prune.train_once(model, [batch]).values()
    assert passes > 0 and all(parameter.grad is None for parameter in model.parameters())
    halves = [{phase: seconds / 4 for phase, seconds in run.items()} for run in runs]
    assert prune.compared("", runs, halves, 2, 1.0)["ratio"] == pytest.approx(2)
    row = {
        "model": "tiny",
        "target": 60,
        "runs": [dict.fromkeys(prune.PHASES, seconds) for seconds in (1.0, 2.0, 4.0)],
    }
    (*_, line) = markdown_table.phases_table([row]).splitlines()
    assert line == "| tiny | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 10 (5 to 20) | 60 |"
