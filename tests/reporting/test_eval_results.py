"""Results in the form that the Hub reads: files that its own client parses, one a metric."""

import huggingface_hub
import pytest
import yaml
from tiny import make_model
from trainers import make_trainer

from hap_transformers import HapConfig, PruningPlan
from hap_transformers.reporting.eval_results import write_eval_results


METRICS = {"accuracy": 0.85, "f1": 0.9, "loss": 0.4, "test_loss": 0.5}


def plan(**settings):
    return PruningPlan.for_model(make_model(), heads={1: [0]}, **settings)


def parsed(files):
    """Entries by file. The client of Transformers 4.57 does not know this form yet."""
    entries = {}
    for file in files:
        data = yaml.safe_load(file.read_text())
        if hasattr(huggingface_hub, "parse_eval_result_entries"):
            (entry,) = huggingface_hub.parse_eval_result_entries(data)
            found = (entry.dataset_id, entry.task_id, entry.value, entry.notes)
        else:
            (entry,) = data
            found = (entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"], entry["notes"])
        entries[file.name] = found
    return entries


@pytest.mark.parametrize("dataset", ["glue", "nyu-mll/glue"])
def test_a_file_a_metric(tmp_path, dataset):
    files = write_eval_results(tmp_path, METRICS, dataset, "mrpc", plan(ratio=0.6, budget="params"))
    notes = "60 % of the dense encoder's parameters removed"
    assert parsed(files) == {
        "glue_mrpc_accuracy.yaml": ("nyu-mll/glue", "mrpc", 0.85, f"accuracy, {notes}"),
        "glue_mrpc_f1.yaml": ("nyu-mll/glue", "mrpc", 0.9, f"f1, {notes}"),
    }
    assert {file.parent for file in files} == {tmp_path / ".eval_results"}


def test_other_plans_and_names(tmp_path):
    (file,) = write_eval_results(tmp_path, {"a/b c": 1}, "me/data", None, plan())
    assert parsed([file]) == {"data_default_a_b_c.yaml": ("me/data", "default", 1.0, "a/b c, pruned")}
    (file,) = write_eval_results(tmp_path, {"accuracy": 1}, "me/data", "x", plan(ratio=0.125, budget="heads"))
    assert parsed([file])[file.name][-1] == "accuracy, 12.5 % of all attention heads removed"


@pytest.mark.parametrize("dataset, metrics", [(None, METRICS), ("my rows", METRICS), ("me/data", {"loss": 1.0})])
def test_without_a_name_on_the_hub_there_are_none(tmp_path, dataset, metrics):
    assert write_eval_results(tmp_path, metrics, dataset) == [] and not (tmp_path / ".eval_results").exists()


def test_earlier_results_go_and_those_of_others_stay(tmp_path):
    write_eval_results(tmp_path, METRICS, "glue", "mrpc")
    other = tmp_path / ".eval_results" / "other.yaml"
    other.write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    (file,) = write_eval_results(tmp_path, {"accuracy": 0.5}, "glue", "sst2")
    assert sorted((tmp_path / ".eval_results").iterdir()) == [file, other]
    assert write_eval_results(tmp_path, METRICS, None) == [] and other.exists() and not file.exists()


def test_beside_the_card_of_a_trainer(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5))
    trainer.prune()
    trainer.evaluate()
    for tags in ("me/rows", ["me/rows"], ["me/rows", "me/others"], None):
        trainer.create_model_card(dataset_tags=tags, dataset_args="all")
        files = list((tmp_path / ".eval_results").glob("*"))
        if tags is None or len(tags) == 2:
            assert not files  # Of two data sets, the metric does not say which it is of.
            continue
        ((name, task, value, notes),) = parsed(files).values()
        assert (name, task) == ("me/rows", "all") and value == trainer.results["metrics"]["pruned"]["accuracy"]
        assert notes == "accuracy, 50 % of the dense encoder's parameters removed"
