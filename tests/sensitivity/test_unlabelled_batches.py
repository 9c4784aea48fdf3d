"""A batch in which no label counts weighs nothing in scores, refit and training, nor does one without examples."""

import dataclasses

import pytest
import torch
from tiny import make_batch, make_model
from trainers import Rows, make_trainer
from zoo import ZOO

from hap_transformers import HapConfig, apply_plan, estimate_sensitivity, plan_pruning, reconstruct, tune_layers
from hap_transformers.sensitivity.batches import counts, scored_batches


METHODS = ["kronecker", "gauss_newton_trace", "fisher", "gradient"]
# Few classes, so that all output directions are exact: the signs of random mixtures depend on a batch's number.
SIZES = {"masked words": (4, {"vocab_size": 5}), "tags": (7, {"num_labels": 3}), "answers": (7, {})}
TASKS = {"masked words": "ForMaskedLM", "tags": "ForTokenClassification", "answers": "ForQuestionAnswering"}


def batch_of(task, seed, labelled=True):
    """Two examples; where they are labelled, some positions are not."""
    length, _ = SIZES[task]
    generator = torch.Generator().manual_seed(seed)
    batch = {"input_ids": torch.randint(1, 5, (2, length), generator=generator)}
    if task == "answers":
        positions = torch.randint(0, length, (2, 2), generator=generator) if labelled else torch.full((2, 2), 512)
        return {**batch, "start_positions": positions[0], "end_positions": positions[1]}
    labels = torch.full_like(batch["input_ids"], -100)
    if labelled:
        labels[0, :3] = torch.randint(0, 3, (3,), generator=generator)
        labels[1, 1] = 2
    return {**batch, "labels": labels}


def make_task(task):
    return dataclasses.replace(ZOO["bert"], task=TASKS[task]).model(**SIZES[task][1])


def assert_equal(found, expected):
    for name in ("scores", "order", "traces", "stderr", "interactions"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert (found.num_examples, found.reliability) == (expected.num_examples, expected.reliability)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_without_it(task, method):
    model, labelled = make_task(task), [batch_of(task, seed) for seed in range(3)]
    nothing = batch_of(task, 7, labelled=False)
    expected = estimate_sensitivity(model, labelled, method, progress=False)
    mixed = [nothing, labelled[0], nothing, nothing, labelled[1], labelled[2], nothing]
    assert_equal(estimate_sensitivity(model, mixed, method, progress=False), expected)
    assert expected.num_examples == 6


@pytest.mark.parametrize("method", METHODS)
def test_the_first_label_of_a_causal_language_model_does_not_count(method):
    """No position predicts it. Each batch has its own random signs, so the batch without labels is the last one."""
    model = dataclasses.replace(ZOO["gpt2"], task="LMHeadModel").model(vocab_size=5)
    labelled = [batch_of("masked words", seed) for seed in range(2)]
    first = batch_of("masked words", 7, labelled=False)
    first["labels"][:, 0] = 3
    found = estimate_sensitivity(model, [*labelled, first], method, progress=False)
    assert_equal(found, estimate_sensitivity(model, labelled, method, progress=False))
    with pytest.raises(ValueError, match="no label in it counts"):
        estimate_sensitivity(model, [first], method, progress=False)
    assert counts(first) and not counts(first, shifted=True) and counts(labelled[0], shifted=True)


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace"])
def test_answers_with_one_side_beyond_the_text(method):
    """A batch's loss is defined by its other examples. Of such an example alone it is not."""
    model = dataclasses.replace(ZOO["deberta-v2"], task="ForQuestionAnswering").model()
    answered = [batch_of("answers", seed) for seed in range(3)]
    batch = {name: torch.cat([part[name] for part in answered])[:5] for name in answered[0]}
    batch["end_positions"][4] = 512
    found = estimate_sensitivity(model, [batch], method, progress=False)
    assert all(layer.isfinite().all() and layer.any() for layer in (*found.heads, *found.neurons))
    with pytest.raises(ValueError, match="no label in it counts"):
        estimate_sensitivity(model, [{name: value[4:] for name, value in batch.items()}], method, progress=False)


@pytest.mark.parametrize("method", ["kronecker", "hessian_trace"])
def test_random_directions_are_those_without_it(method):
    """Each batch has its own signs, so the batch without labels is the last one."""
    model = dataclasses.replace(ZOO["bert"], task="ForMaskedLM").model()
    batches = [{**make_batch(seed=seed)} for seed in range(2)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["input_ids"], -100)}
    expected = estimate_sensitivity(model, batches, method, progress=False)
    assert expected.num_probes
    assert_equal(estimate_sensitivity(model, [*batches, nothing], method, progress=False), expected)


def test_it_does_not_count_as_examples():
    model, labelled = make_task("tags"), [batch_of("tags", seed) for seed in range(3)]
    nothing = batch_of("tags", 7, labelled=False)
    expected = estimate_sensitivity(model, labelled[:2], progress=False)
    mixed = [labelled[0], nothing, labelled[1], labelled[2]]
    assert_equal(estimate_sensitivity(model, mixed, max_examples=4, progress=False), expected)


def test_a_batch_that_is_cut_to_examples_without_labels():
    """`max_examples` may leave only examples without labels of the last batch."""
    model, first, last = make_task("tags"), batch_of("tags", 0), batch_of("tags", 1)
    last["labels"][0] = -100
    expected = estimate_sensitivity(model, [first], progress=False)
    found = estimate_sensitivity(model, [first, last], max_examples=3, progress=False)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace"])
def test_an_example_without_labels_where_the_model_runs_example_by_example(method):
    """DeBERTa applies the query projection to positions that all examples share, so each example runs by itself."""
    model = dataclasses.replace(ZOO["deberta-v3"], task="ForTokenClassification").model(num_labels=3)
    batch = batch_of("tags", 0)
    alone = {name: value[:1] for name, value in batch.items()}
    expected = estimate_sensitivity(model, [alone], "gauss_newton_trace", progress=False)
    batch["labels"][1] = -100
    found = estimate_sensitivity(model, [batch], method, progress=False)
    if method == "gauss_newton_trace":  # The mean loss of the batch is the loss of the one example.
        torch.testing.assert_close(found.traces, expected.traces, rtol=1e-9, atol=1e-12)
    assert all(layer.isfinite().all() and layer.any() for layer in found.scores["heads"])


@pytest.mark.parametrize("task", TASKS)
def test_nothing_but_such_batches_is_refused(task):
    nothing = [batch_of(task, seed, labelled=False) for seed in range(2)]
    with pytest.raises(ValueError, match="No examples to score: .* no label in it counts"):
        estimate_sensitivity(make_task(task), nothing, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_batches_whose_mask_excludes_all_tokens(method):
    """They weigh nothing, and nothing but such batches is refused."""
    model, first, last = make_task("tags"), batch_of("tags", 0), batch_of("tags", 1)
    last["attention_mask"] = torch.zeros_like(last["input_ids"])
    expected = estimate_sensitivity(model, [first], method, progress=False)
    found = estimate_sensitivity(model, [first, last], method, progress=False)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    with pytest.raises(ValueError, match="No examples to score: .* its masks exclude all tokens"):
        estimate_sensitivity(model, [last], method, progress=False)


@pytest.mark.parametrize("method", ["kronecker", "fisher"])
@pytest.mark.parametrize("after", range(1, 7))
def test_resumed_over_such_batches_equals_uninterrupted(tmp_path, method, after):
    model, state = make_task("tags"), tmp_path / "state"
    batches = [batch_of("tags", seed, labelled=seed not in (0, 2, 3, 6)) for seed in range(7)]

    def interrupted():
        yield from batches[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_sensitivity(model, interrupted(), method, state_file=state, progress=False)
    assert state.exists() == (after > 1)
    done = []

    def loss_fn(model, batch):
        done.append(int(batch["input_ids"].sum()))
        return model(**batch).loss

    result = estimate_sensitivity(model, batches, method, state_file=state, loss_fn=loss_fn, progress=False)
    labelled = [batches[i] for i in (1, 4, 5)]
    assert_equal(result, estimate_sensitivity(model, labelled, method, progress=False))
    assert done == [int(batches[i]["input_ids"].sum()) for i in (1, 4, 5) if i >= after]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "batch, expected",
    [
        ({"input_ids": torch.ones(2, 3)}, True),
        ({"labels": torch.tensor([-100, 1])}, True),
        ({"labels": torch.tensor([-100, -100])}, False),
        ({"labels": torch.tensor([0.5, -100.0])}, True),
        ({"labels": torch.tensor([-100, -100]), "next_sentence_label": torch.tensor([1, 0])}, True),
        ({"labels": torch.tensor([-100]), "next_sentence_label": torch.tensor([-100])}, False),
        ({"input_ids": torch.ones(2, 3), "start_positions": torch.tensor([3, 9])}, False),
        ({"input_ids": torch.ones(2, 3), "start_positions": torch.tensor([3, 2])}, True),
        ({"start_positions": torch.tensor([3, 2])}, True),
        ({"labels": None, "input_ids": torch.ones(2, 3)}, True),
    ],
)
def test_labels_that_count(batch, expected):
    assert counts(batch) is expected


def test_batches_keep_their_numbers():
    nothing = batch_of("tags", 7, labelled=False)
    found = list(scored_batches([nothing, batch_of("tags", 0), nothing, batch_of("tags", 1)], None))
    assert [(batch.number, batch.first, batch.size) for batch in found] == [(1, 0, 2), (3, 2, 2)]


def test_train_prune_and_train_again(tmp_path):
    """As in training, where such a batch leaves weights as they are."""
    rows = Rows()
    for number, row in enumerate(rows.rows):
        row["labels"] = torch.full_like(row["input_ids"], -100)
        if number % 3 == 0:
            row["labels"][2] = row["input_ids"][2] % 2
    model = dataclasses.replace(ZOO["bert"], task="ForTokenClassification").model(torch.float32)
    config = HapConfig(ratio=0.5, max_examples=12, distillation=0.5)
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=config, per_device_train_batch_size=1)
    trainer.train()
    plan = trainer.prune()
    assert plan.count("neurons") and 0 < trainer.sensitivity.num_examples < 12
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_refit_reads_labelled_batches_only(tmp_path):
    labelled = make_trainer(tmp_path, model=make_model(dtype=torch.float32), per_device_train_batch_size=1)
    rows = Rows()
    for row in rows.rows[::2]:
        row["labels"] = torch.tensor(-100)
    labelled.train_dataset = rows
    batches = labelled.calibration_batches()
    assert len(batches) == 12 and all(batch["labels"] >= 0 for batch in batches)


def test_a_batch_without_examples_is_left_out():
    """Those behind it count, as in scores without it, so in refit and tuning."""
    batches = [make_batch(seed=seed) for seed in range(3)]
    nothing = {name: value[:0] for name, value in batches[0].items()}
    dense, found = make_model(), []
    for given in (batches, [batches[0], nothing, *batches[1:], nothing]):
        scores = estimate_sensitivity(dense, given, progress=False)
        model = make_model()
        apply_plan(model, plan_pruning(scores, model, ratio=0.5))
        reconstruct(model, dense, given, progress=False)
        tune_layers(model, dense, given, progress=False)
        found.append((scores, list(model.parameters())))
    (expected, weights), (scores, others) = found
    assert_equal(scores, expected)
    torch.testing.assert_close(others, weights, rtol=0, atol=0)
    assert estimate_sensitivity(dense, [nothing, *batches], max_examples=6, progress=False).num_examples == 6
