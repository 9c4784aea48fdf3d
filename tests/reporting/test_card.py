from huggingface_hub import ModelCard
from tiny import make_model
from trainers import make_trainer

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.reporting.card import make_model_card
from hap_transformers.reporting.costs import costs_of


RESULTS = {
    "metrics": {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8}, "recovered": {"accuracy": 0.85}},
    "parameters": {"dense": 1234567, "pruned": 80},
    "flops": {"dense": 1000, "pruned": 700},
    "latency_ms": {"dense": 2.04, "pruned": 1.5},
}


def make_card(tmp_path, **settings):
    model = make_model()
    plan = PruningPlan.for_model(model, heads={1: [0, 3]}, neurons={0: range(20)}, ratio=0.25, method="hessian_trace")
    apply_plan(model, plan)
    make_model_card(model, plan=plan, **settings).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_what_became_of_the_recovery(tmp_path):
    watched = {"before": 0.2, "after": 0.1, "step": 1200}
    text = make_card(tmp_path, results={**RESULTS, "recovery": watched}).text
    assert "Its weights are those of step 1,200, which were the best. `config.json`" in text
    text = make_card(tmp_path, results={**RESULTS, "recovery": {**watched, "step": 0}}).text
    assert "did not help and was undone. `config.json`" in text and "was fine-tuned again" not in text


def test_a_model_that_was_pruned_before_is_no_dense_one(tmp_path):
    model = make_model()
    for pruned_before, name in ((False, "dense"), (True, "before")):
        found = costs_of({"dense": model, "pruned": model})
        assert found["pruned_before"] is pruned_before
        text = make_card(tmp_path, results=found).text
        assert f"| | {name} | pruned |" in text and f"| | {name} | pruned | left |" in text
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}))


def test_card(tmp_path):
    card = make_card(
        tmp_path, base_model="org/tiny", dataset="mrpc", results=RESULTS, model_name="small", tags=["glue"]
    )
    assert card.data.datasets is None  # Not known to be its name on the Hub.
    assert set(card.data.tags) == {"hap", "pruned", "hap_transformers", "glue"}
    assert card.data.base_model == "org/tiny" and card.data.pipeline_tag == "text-classification"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("mrpc", "accuracy", 0.85)
    assert "# small\n\norg/tiny, fine-tuned on mrpc, with 6 of 8 attention heads and 28" in card.text
    assert (
        "scored by `hessian_trace`" in card.text and "was fine-tuned again" in card.text and "## Metrics" in card.text
    )
    for line in (
        "| recovered | 0.8500 |",
        "| parameters | 1,234,567 | 80 |",
        "| latency, one batch, ms | 2.0 | 1.5 |",
        "| heads | 4 of 4 | 2 of 4 |",
        "| neurons | 4 | 24 |",
    ):
        assert line in card.text.splitlines()


def test_the_hub_s_name_of_the_data(tmp_path):
    card = make_card(tmp_path, dataset="my MRPC", dataset_tags="glue", dataset_args="mrpc", results=RESULTS)
    (result,) = card.data.eval_results
    assert card.data.datasets == result.dataset_type == "glue" and result.dataset_config == "mrpc"
    assert result.dataset_name == "my MRPC" and "fine-tuned on my MRPC" in card.text
    assert "fine-tuned on glue" in make_card(tmp_path, dataset_tags="glue").text


def test_a_model_of_which_nothing_more_is_known(tmp_path):
    card = make_card(tmp_path)
    assert "was fine-tuned again" not in card.text
    assert card.data.eval_results is None and "## Metrics" not in card.text
    assert "BertForSequenceClassification.from_pretrained" in card.text and "| heads | 4 of 4 | 2 of 4 |" in card.text


def test_the_index_is_of_the_pruned_model(tmp_path):
    dense_only = make_card(tmp_path, results={"metrics": {"dense": {"accuracy": 0.9}}})
    assert dense_only.data.eval_results is None and "| dense | 0.9000 |" in dense_only.text
    not_recovered = make_card(tmp_path, results={"metrics": {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8}}})
    assert [result.metric_value for result in not_recovered.data.eval_results] == [0.8]


def test_own_words_in_the_output_folder_are_kept(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()  # Of the dense model, by `Trainer`.
    trainer.prune()
    trainer.create_model_card()
    written = ModelCard.load(tmp_path / "README.md")
    assert "Attention heads and FFN neurons left" in written.text  # In the place of Trainer's.
    mark = next(line for line in written.text.splitlines() if line.startswith("<!-- Written by hap_transformers"))
    (tmp_path / "README.md").write_text(written.content.replace(mark, "My own words.").replace("- pruned\n", ""))
    trainer.create_model_card(tags="later")
    kept = ModelCard.load(tmp_path / "README.md")
    assert "My own words." in kept.text and {"hap", "pruned", "later"} <= set(kept.data.tags)


def test_a_repository_with_a_license_alone_gets_a_card(tmp_path):
    trainer = make_trainer(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    trainer.prune()
    trainer.create_model_card()
    assert "Attention heads and FFN neurons left" in ModelCard.load(tmp_path / "README.md").text


def test_metrics_of_all_phases_have_columns(tmp_path):
    """What `evaluate(metric_key_prefix="test")` adds is of one phase alone."""
    metrics = {
        "dense": {"accuracy": 0.9, "loss": 0.3},
        "pruned": {"test_loss": 0.5, "test_accuracy": 0.8, "loss": 0.4},
        "recovered": {"accuracy": 0.85, "odd|name": 1.0},
    }
    text = make_card(tmp_path, results={"metrics": metrics}).text
    start = text.index("| phase |")
    table = text[start : text.index("\n\n", start)].splitlines()
    assert table[0] == "| phase | accuracy | test_accuracy | odd\\|name | loss | test_loss |"
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[3] == "| pruned |  | 0.8000 |  | 0.4000 | 0.5000 |"
    assert table[4] == "| recovered | 0.8500 |  | 1.0000 |  |  |"


def test_metrics_of_another_prefix_reach_the_card(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.prune()
    trainer.evaluate(metric_key_prefix="test")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    lines = [line for line in card.text.splitlines() if line.startswith(("| phase", "| pruned |"))]
    assert lines[0] == "| phase | test_accuracy | test_loss |"
    assert float(lines[1].split("|")[2]) == round(trainer.results["metrics"]["pruned"]["test_accuracy"], 4)
    assert {result.metric_type for result in card.data.eval_results} == {"test_accuracy", "test_loss"}


def test_intervals(tmp_path):
    results = {**RESULTS, "intervals": {"dense": {"accuracy": [0.88, 0.92]}, "recovered": {}}}
    text = make_card(tmp_path, results=results).text
    assert "| dense | 0.9000 (0.880 to 0.920) |" in text and "| recovered | 0.8500 |" in text
    assert "Brackets are 95 % bootstrap intervals over the validation examples." in text
    assert "Brackets" not in make_card(tmp_path, results=RESULTS).text
