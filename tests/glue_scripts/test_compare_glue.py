"""The comparison on a tiny task: its cells, their resumption, and its workers."""

import json
import operator
import os
import runpy
import signal
import subprocess
import sys
import time

import matplotlib.image
import psutil
import pytest
import torch
from datasets import Dataset, load_dataset
from script_inputs import save_model
from tiny import ROOT, make_batch, make_model
from tiny_comparison import make_tiny

from glue_scripts.compare_glue.base_models import BASE_MODELS, MINILM, MPNET, BaseModel
from glue_scripts.compare_glue.cells import axes_of
from glue_scripts.compare_glue.folds import split_fold
from glue_scripts.compare_glue.grids import PRESETS, Grid
from glue_scripts.compare_glue.job import Job
from glue_scripts.compare_glue.latency import structure
from glue_scripts.compare_glue.methods import CONTROL, DEFAULT, DIMENSIONS, METHODS, PAPER, drop_empty_layers
from glue_scripts.compare_glue.remembered_teacher import remember_logits
from glue_scripts.compare_glue.run import main
from glue_scripts.compare_glue.settings import SETTINGS, Setting
from glue_scripts.compare_glue.torch_pruning_plan import torch_pruning_plan
from glue_scripts.compare_glue.workers import make_pool, run_each
from hap_transformers import HapConfig, HapTrainer, PruningPlan, apply_plan
from hap_transformers.efficiency import count_encoder_parameters


pytestmark = pytest.mark.any_release


@pytest.fixture
def tiny(tmp_path, model_dir, monkeypatch):
    return make_tiny(tmp_path, model_dir, monkeypatch)


@pytest.fixture(scope="module")
def every_method(tmp_path_factory):
    """The command that ran every method, its cells, its output folder, and each recovery step and its distillation."""
    folder, seen = tmp_path_factory.mktemp("every"), []
    compute_loss = HapTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training and self.args.max_steps > 0:  # Else it is the fine-tuning, which counts epochs.
            step = self.state.global_step, self.args.learning_rate, inputs["input_ids"].tolist()
            seen.append((step, self.hap_config.distillation))
        return compute_loss(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        command = [*make_tiny(folder, save_model(folder), patch), "--methods", *METHODS]
        patch.setattr(HapTrainer, "compute_loss", spy)
        return command, main(command)["grid"], folder / "out", seen


def test_every_method_once_and_never_again(every_method, monkeypatch, capsys, drawn):
    command, cells, out, _ = every_method
    assert [cell["method"] for cell in cells] == list(METHODS)
    by_method = {cell["method"]: cell for cell in cells}
    encoder = count_encoder_parameters(make_model(vocab_size=40))
    for cell in cells:
        share = (cell["parameters"]["dense"] - cell["parameters"]["pruned"]) / encoder
        # Enough, and by less than a head and 8 neurons of both layers too much.
        assert 0.5 <= share < 0.8 if cell["method"] != CONTROL else share == 0, cell["method"]
        assert set(cell["recovered"]) == {"accuracy", "loss"} and set(cell["seconds"]) == {"score", "prune", "recover"}
    control = by_method[CONTROL]
    assert control["ratio"] == 0 and control["pruned"] == control["dense"]
    dropped = by_method["top layers dropped"]
    assert dropped["heads"][1] == dropped["neurons"][1] == 0  # Half the encoder is a bit more than a layer's blocks.
    assert dropped["heads"][0] >= 3 and dropped["neurons"][0] >= 16
    ranks = by_method[DIMENSIONS]["ranks"]
    assert set(ranks) == {"query_key_dims", "value_dims"} and all("ranks" not in cell for cell in cells[3:])
    assert by_method[DIMENSIONS]["heads"] == [sum(map(bool, layer)) for layer in ranks["value_dims"]]
    floored = by_method["top layers, floor and refit"]
    assert floored["heads"][1] == 1 and 0 < floored["neurons"][1] <= 8
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("the cell was run again"))
    assert main(command)["grid"] == cells
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == cells
    assert (out / "grid.md").read_text() in capsys.readouterr().out
    assert len((out / "grid.csv").read_text().splitlines()) == 1 + len(cells)
    latencies = json.loads((out / "latencies.json").read_text())
    assert {structure(cell) for cell in cells} == set(latencies)
    for kind in ("gains", "kept", "latency", "ranks"):
        assert is_drawn(out / f"grid-{kind}.png")


def test_all_methods_recover_alike(every_method):
    *_, seen = every_method
    first, second = usual = [step for step, _ in seen[:2]]
    assert first[:2] == (0, 5e-5) and second[:2] == (1, 5e-5)
    assert [step for step, _ in seen] == usual * len(METHODS)
    others = {CONTROL: 0.0, f"{DEFAULT}, no distillation": 0.0}
    others |= dict.fromkeys([PAPER, f"{PAPER}, exact trace"], HapConfig.paper().distillation)
    assert [share for _, share in seen[::2]] == [others.get(name, 0.5) for name in METHODS]


def test_dropped_layers_leave_a_shorter_model():
    model, shorter = (make_model(num_hidden_layers=3) for _ in range(2))
    shorter.base_model.encoder.layer = shorter.base_model.encoder.layer[:2]
    everything = {"heads": {2: range(4)}, "neurons": {2: range(24)}}
    apply_plan(model, PruningPlan.for_model(model, **everything))
    batch = make_batch()
    wanted = shorter(**batch).logits
    assert not torch.allclose(model(**batch).logits, wanted)  # The empty layer's norms still act.
    drop_empty_layers(model)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=0)
    assert model.config.num_hidden_layers == 2


def test_recovery_has_its_steps_and_evaluation_little_padding(tiny, tmp_path, monkeypatch):
    features = load_dataset("parquet", data_files=str(tmp_path / "sst2" / "train.parquet"))["train"].features
    rows = {"sentence": ["good film bad plot", "bad", "good plot", "film"], "label": [1, 0, 1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sst2" / "validation.parquet")
    taken = []
    train = HapTrainer.train
    monkeypatch.setattr(HapTrainer, "train", lambda self: train(self) and taken.append(self.state.global_step))
    (cell,) = main([*tiny, "--methods", DEFAULT])["grid"]
    assert taken == [1, 2]  # An epoch of 16 examples; then --recovery_steps.
    assert cell["recovered"]["loss"] != cell["pruned"]["loss"]
    job = Job("sst2", 0, str(tmp_path), tmp_path / "out")
    assert [len(ids) - 2 for ids in job.evaluated["input_ids"]] == [1, 1, 2, 4]
    assert list(job.evaluated["label"]) == [0, 0, 1, 1]


def test_training_examples_replace_those_of_the_setting(tiny, tmp_path, monkeypatch):
    """Fine-tuning and recovery have them, and they are not more than there are."""
    trained = []
    train = HapTrainer.train
    monkeypatch.setattr(HapTrainer, "train", lambda self: trained.append(len(self.train_dataset)) or train(self))
    main([*tiny, "--methods", "random", "--train_examples", "24"])
    assert trained == [24, 24]
    with pytest.raises(ValueError, match=r"`train_examples` is 1,000, but sst2 has \d+ to train on; ask for fewer"):
        main([*tiny, "--methods", "random", "--train_examples", "1000", "--output_dir", str(tmp_path / "other")])


def test_heads_alone(tiny):
    methods = [DEFAULT, "gradient", "random", "top layers dropped"]
    for cell in main([*tiny, "--methods", *methods, "--budget", "heads", "--recover", "False"])["grid"]:
        assert sum(cell["heads"]) == 4 and set(cell["neurons"]) == {24} and "recovered" not in cell


def test_a_cell_that_was_not_recovered_is_run_again(tiny, tmp_path):
    (first,) = main([*tiny, "--methods", "random", "--recover", "False"])["grid"]
    (second,) = main([*tiny, "--methods", "random"])["grid"]
    assert "recovered" not in first and second["pruned"] == first["pruned"] and "recovered" in second
    assert "recovered" in (tmp_path / "out" / "grid.md").read_text()


def test_cells_of_one_task_and_seed_share_a_dense_model(tiny, tmp_path):
    """Where the dense model was lost and is trained anew, it is another one, and the cells are no longer paired."""
    main([*tiny, "--methods", "random", "--recover", "False"])
    file = tmp_path / "out" / "cells.jsonl"
    (cell,) = map(json.loads, file.read_text().splitlines())
    cell["dense"]["loss"] += 0.001
    file.write_text(json.dumps(cell) + "\n")
    main([*tiny, "--methods", "random", "--recover", "False"])  # Nothing is missing.
    with pytest.raises(ValueError, match="sst2, seed 0, that start from another dense model"):
        main([*tiny, "--methods", "gradient", "--recover", "False"])
    assert len(file.read_text().splitlines()) == 1


def test_cells_of_one_file_share_their_settings(tiny, tmp_path):
    main([*tiny, "--methods", "random", "--recover", "False"])
    file = tmp_path / "out" / "cells.jsonl"
    others = [("--recovery_steps", "3"), ("--refit_examples", "8"), ("--recovery_learning_rate", "1e-3")]
    for other in (*others, ("--train_examples", "8")):
        with pytest.raises(ValueError, match="cells with other common settings"):
            main([*tiny, "--methods", "gradient", "--recover", "False", *other])
    assert len(file.read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="`recovery_steps` must be positive, got 0"):
        main([*tiny, "--recovery_steps", "0"])


def test_another_base_model(tiny, tmp_path, model_dir, monkeypatch, capsys):
    """Its cells lie beside those of the first one, and no table has both."""
    caches, rates, train = [], [], HapTrainer.train
    monkeypatch.setitem(BASE_MODELS, MPNET, BaseModel(lambda cache: caches.append(cache) or model_dir, 3e-5))
    monkeypatch.setattr(HapTrainer, "train", lambda self: rates.append(self.args.learning_rate) or train(self))
    (first,) = main([*tiny, "--methods", "random", "--recover", "False"])["grid"]
    (second,) = main([*tiny, "--methods", "random", "--recover", "False", "--model", MPNET])["grid"]
    assert (first["model"], second["model"]) == (MINILM, MPNET)
    assert rates == [1e-4, 3e-5] and caches[0] == tmp_path / "out" / "downloads"
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "dense" / MPNET / "sst2-0" / "config.json").exists()
    with pytest.raises(ValueError, match="Cells of several models"):
        axes_of([first, second])
    with pytest.raises(ValueError, match="Unknown model 'large'; choose one of all-MiniLM-L6-v2, all-mpnet-base-v2"):
        main([*tiny, "--model", "large"])


def test_a_task_and_seed_is_done_before_the_next(tiny, monkeypatch):
    order = []
    run = Job.run
    monkeypatch.setattr(Job, "run", lambda self, *args: order.append((self.seed, args[1])) or run(self, *args))
    grids = {budget: Grid(["sst2"], ["random"], [0.5], [0, 1], budget) for budget in ("params", "heads")}
    monkeypatch.setitem(PRESETS, "quick", grids)
    found = main([*tiny, "--preset", "quick", "--recover", "False"])
    assert order == [(0, "params"), (0, "heads"), (1, "params"), (1, "heads")]
    assert [len(cells) for cells in found.values()] == [2, 2]


def test_a_report_of_what_there_is_runs_nothing(tiny, tmp_path, monkeypatch):
    cells = main([*tiny, "--methods", DEFAULT])["grid"]
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("a cell was run"))
    assert main([*tiny, "--methods", DEFAULT, "fisher, floor and refit", "--report_only"])["grid"] == cells
    assert f"| {DEFAULT} |" in (tmp_path / "out" / "grid.md").read_text()
    assert main([*tiny, "--methods", "random", "--report_only"])["grid"] == []


def test_a_fold_is_not_trained_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "sst2", Setting(None, 1))
    features = load_dataset("parquet", data_files=str(tmp_path / "sst2" / "train.parquet"))["train"].features
    words = ["good", "bad", "film", "plot"]
    distinct = {"sentence": [f"{a} {b} {c}" for a in words for b in words for c in words[:2]], "label": [0, 1] * 16}
    Dataset.from_dict(distinct, features=features).to_parquet(tmp_path / "sst2" / "train.parquet")
    job = Job("sst2", 0, str(tmp_path), tmp_path / "out", fold=True)
    rows = job.task.data["train"]
    kept, held_out = split_fold(rows["sentence"], job.setting)
    assert len(job.train) == 26 and len(job.evaluated) == 6
    assert sorted([*kept, *held_out]) == list(range(len(rows)))
    trained, evaluated = ({tuple(ids) for ids in data["input_ids"]} for data in (job.train, job.evaluated))
    assert len(trained) == 26 and len(evaluated) == 6 and not trained & evaluated
    main([*tiny, "--methods", "random", "--recover", "False"])  # From another dense model.
    (cell,) = main([*tiny, "--methods", DEFAULT, "--fold", "--recover", "False"])["grid"]
    assert cell["fold"] and "recovered" not in cell
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 2


def test_a_line_that_was_cut_is_named(tiny, tmp_path):
    main([*tiny, "--methods", "random", "--recover", "False"])
    file = tmp_path / "out" / "cells.jsonl"
    file.write_text(file.read_text() + '{"task": "sst2", "me')
    with pytest.raises(ValueError, match="Line 2 of .*cells.jsonl' is no cell; remove it"):
        main([*tiny, "--methods", "gradient", "--recover", "False"])


def test_a_fold_of_phrases_shares_no_sentence_with_training(tmp_path, tiny, monkeypatch):
    texts = ["a b c d", "a b", "x a b c d y", "b c", "e f g h", "f g", "e", "k l m n"]
    rows = {"sentence": texts, "label": [0, 1] * 4}
    features = load_dataset("parquet", data_files=str(tmp_path / "sst2" / "train.parquet"))["train"].features
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sst2" / "train.parquet")
    monkeypatch.setitem(SETTINGS, "sst2", Setting(None, 1, held_out=1, fold_words=4))
    job = Job("sst2", 0, str(tmp_path), tmp_path / "out", fold=True)
    order = job.task.data["train"].shuffle(seed=0)["sentence"]
    kept, held = ([order[i] for i in part] for part in split_fold(order, job.setting))
    assert len(held) == len(job.evaluated) == 1 and len(held[0].split()) >= 4
    assert set(kept) == {text for text in texts if text not in held[0] and held[0] not in text}


@pytest.fixture
def torch_of_workers(tmp_path, monkeypatch):
    """The folder of a module that new processes import for torch: to import that takes seconds."""
    (tmp_path / "torch.py").write_text("def set_num_threads(number):\n    assert number > 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_workers_share_the_cells_and_stop_at_an_error(torch_of_workers):
    with make_pool(2) as pool:
        assert sorted(run_each(pool, operator.mul, "", 2, [(3,), (4,), (5,)])) == [6, 8, 10]
        with pytest.raises(ZeroDivisionError):
            list(run_each(pool, operator.truediv, "", 2, [(0,)]))


def test_unknown_names_are_refused(tiny):
    with pytest.raises(ValueError, match="Unknown .'magic'"):
        main([*tiny, "--methods", "magic"])


def test_workers_end_with_the_process_that_started_them(torch_of_workers):
    code = """
import os, time
from glue_scripts.compare_glue.workers import make_pool
if __name__ == "__main__":
    with make_pool(2) as pool:
        worker = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)  # By the same worker: no other is started while one is idle.
        print(worker, flush=True)
        time.sleep(600)
"""
    settings = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(torch_of_workers)}}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **settings) as starter:
        worker = int(starter.stdout.readline())
        assert _is_running(worker)
        starter.kill()
    for _ in range(100):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the process that started it")


def _is_running(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


@pytest.mark.reliability
def test_workers_of_the_command_find_their_modules(tmp_path, monkeypatch):
    """In their own processes, where the command's main module has another name."""
    folders = ["--data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["", "--workers", "2", "--tasks", "mrpc", "--seeds", "0", *folders])
    with pytest.raises(SystemExit, match="compare_glue: The data folder lacks"):  # Raised where the job is made.
        runpy.run_module("glue_scripts.compare_glue", run_name="__main__", alter_sys=True)


def is_drawn(path):
    image = matplotlib.image.imread(path)
    return min(image.shape[:2]) > 150 and image[..., :3].std() > 0.01


def test_torch_pruning_removes_the_share_asked_for():
    model = make_model().float()
    plan = torch_pruning_plan(model, [make_batch(), make_batch(seed=1)], 0.5)
    plan.validate(model)
    removed, encoder = plan.count_parameters(model), count_encoder_parameters(model)
    assert 0.5 * encoder <= removed < 0.7 * encoder
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_remembered_teacher_gives_the_models_logits_and_runs_once():
    model, inputs, calls = make_model().eval(), make_batch(), []
    wanted = model(**inputs).logits.float()
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    teacher = remember_logits(model)
    with torch.no_grad():
        first = teacher(**inputs).logits
        torch.testing.assert_close(first, wanted)
        flipped = {name: value.flip(0) for name, value in inputs.items()}
        padded = {name: torch.nn.functional.pad(flipped[name], (0, 2)) for name in ("input_ids", "attention_mask")}
        assert torch.equal(teacher(**{**flipped, **padded}).logits, first.flip(0))
        assert len(calls) == 1
        teacher(**make_batch(seed=1))
    assert len(calls) == 2
