"""The study on CIFAR-10, with tiny networks and generated images."""

import copy
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from image_files import parquet_folder, pixels_of
from in_process import run_here
from matplotlib.figure import Figure
from torch.nn import functional as F

from glue_scripts.compare_glue.cells import read_cells
from glue_scripts.compare_glue.torch_pruning_plan import loss_gradients, plan_by_gradients
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_encoder_parameters
from vision_scripts.cifar_configs import CifarPreResNetConfig
from vision_scripts.cifar_models import CifarPreResNetForImageClassification
from vision_scripts.compare_cifar import low_precision, plot, recovery, tables
from vision_scripts.compare_cifar import run as study
from vision_scripts.compare_cifar.cells import ORDER, RATIOS, Key, keys_of
from vision_scripts.compare_cifar.data import Cifar
from vision_scripts.compare_cifar.methods import DEFAULT, HAP, METHODS, NOTHING, TAYLOR, TAYLOR_REFIT
from vision_scripts.compare_cifar.networks import NETWORKS, Network
from vision_scripts.compare_cifar.recovery import Recovery, recover
from vision_scripts.images import DecodedImages


pytestmark = pytest.mark.any_release


def tiny_network(folder=None):
    """A network with norms that do something."""
    torch.manual_seed(0)
    model = CifarPreResNetForImageClassification(
        CifarPreResNetConfig(depth=1, widths=(6, 8), padded_shortcut=False, num_labels=10)
    )
    for name, tensor in model.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command's flags; two networks of the name of the study's are tiny."""
    for name, size in (("preresnet29", None), ("hf-resnet", 12)):
        monkeypatch.setitem(NETWORKS, name, Network(tiny_network, size))
    monkeypatch.setattr(study, "LATENCY_BATCHES", (2,))
    monkeypatch.setattr(study, "REPEATS", 1)
    data_dir = parquet_folder(tmp_path / "data", train=48, validation=30)
    flags = {
        "data_dir": data_dir,
        "dense_dir": tmp_path,
        "output": tmp_path / "cells.jsonl",
        "ratios": 0.5,
        "seeds": 0,
    }
    flags |= {"score_images": 24, "refit_images": 32, "probes": 2, "probe_images": 8, "test_images": 20}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def test_every_method_gives_a_cell_and_none_is_run_again(command, tmp_path, monkeypatch):
    output = tmp_path / "cells.jsonl"
    study.main([*command, "--networks", "preresnet29"])
    cells = read_cells(output, Key)
    assert [key.method for key in cells] == list(dict.fromkeys(name for _, names, _ in ORDER for name in names))
    dense = tiny_network()
    for key, cell in cells.items():
        method, removed = METHODS[key.method], key.method != NOTHING
        assert ("pruned" in cell, "refitted" in cell, "recovered" in cell) == (removed, method.refit, False)
        assert key.refit_images == (32 if method.refit else 0)
        left = cell["block_parameters"] / count_encoder_parameters(dense)
        assert (0.3 < left <= 0.5) if removed else left == 1
        assert cell["flops"] < cell["dense_flops"] or not removed
        assert (min(cell["channels"]) > 0) or key.method == DEFAULT
        assert set(cell["latency"]) == ({"2"} if removed else set())
    taylor, refitted = (
        cells[Key("preresnet29", TAYLOR, 0.5, 0, 0)],
        cells[Key("preresnet29", TAYLOR_REFIT, 0.5, 0, 32)],
    )
    assert taylor["pruned"] == refitted["pruned"] != refitted["refitted"]
    assert taylor["channels"] == refitted["channels"]
    default = cells[Key("preresnet29", DEFAULT, 0.5, 0, 32)]
    assert default["refitted"]["kl"] < default["pruned"]["kl"]
    assert cells[Key("preresnet29", HAP, 0.5, 0, 0)]["probes"] == 2

    first = output.read_text()
    monkeypatch.setattr(study, "Bench", None)  # A cell would need it.
    monkeypatch.setattr(study, "Cifar", None)
    study.main([*command, "--networks", "preresnet29"])
    assert output.read_text() == first
    output.write_text(first + "{")
    with pytest.raises(ValueError, match="is no cell; remove it"):
        study.main([*command, "--networks", "preresnet29"])


def test_recovery_trains_and_counts_as_another_cell(command, tmp_path):
    flags = [*command, "--networks", "hf-resnet", "--methods", NOTHING, DEFAULT]
    study.main(flags)
    study.main([*flags, "--recovery_epochs", "2", "--recovery_learning_rate", "1e-4"])
    cells = read_cells(tmp_path / "cells.jsonl", Key)
    assert [(key.method, key.recovery_epochs) for key in cells] == [
        (method, epochs) for epochs in (0, 2) for method in (NOTHING, DEFAULT)
    ]
    nothing, default = list(cells.values())[2:]
    assert nothing["recovered"]["kl"] > 0 and "pruned" not in nothing
    assert default["recovered"] != default["refitted"] == list(cells.values())[1]["refitted"]
    assert set(default["seconds"]) == {"score", "plan", "refit", "recover"}
    table, left = tables.phase_tables(cells)[1], default["flops"] / default["dense_flops"]
    assert "method and 2 epochs of recovery at 0.0001" in table and f", FLOPs {left:.0%} |" in table


def test_quality_against_a_plain_loop(command):
    args, *_ = study.HfArgumentParser(study.Arguments).parse_args_into_dataclasses(command)
    bench = study.Bench("hf-resnet", Cifar.load(args.data_dir), args)
    (batch,) = bench.test
    assert batch["pixel_values"].shape == (20, 3, 12, 12)
    other = tiny_network()
    other.classifier.weight.data *= -1
    with torch.no_grad():
        logits, dense = (model(batch["pixel_values"]).logits.double() for model in (other, bench.dense))
    p, q = dense.softmax(1), logits.softmax(1)
    found = bench.quality(other)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == batch["labels"]).double().mean().item(), abs=0.051)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=0.05)
    assert bench.quality(bench.dense)["kl"] == 0


def test_images_are_drawn_from_all_classes_and_resized(tmp_path):
    data = Cifar.load(str(parquet_folder(tmp_path, train=48, validation=30)))
    more = data.batches("train", 20, 3, batch_size=20)[0]
    fewer = data.batches("train", 8, 3, 16)[0]
    assert torch.equal(more["labels"][:8], fewer["labels"]) and len(set(more["labels"].tolist())) == 3
    wide = F.interpolate(more["pixel_values"][:8], (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fewer["pixel_values"], wide)
    assert not torch.equal(data.batches("train", 20, 4)[0]["labels"], more["labels"])
    # The raw pixels' colour says the class.
    images = {pixels_of(i % 3, i).tobytes(): i % 3 for i in range(48)}
    raw = more["pixel_values"] * data.normalize.std + data.normalize.mean
    pixels = (255 * raw).round().byte().permute(0, 2, 3, 1).numpy()
    assert [images[np.ascontiguousarray(one).tobytes()] for one in pixels] == more["labels"].tolist()


def test_taylor_removes_the_channels_of_the_lowest_scores():
    """Of the channels' writer, norm and reader, |weight x gradient| is summed by each and averaged over the three."""
    model = tiny_network()
    batch = {"pixel_values": torch.randn(8, 3, 8, 8), "labels": torch.arange(8)}
    gradients = loss_gradients(model, [batch])
    assert all(parameter.grad is None for parameter in model.parameters())
    example = {"pixel_values": batch["pixel_values"][:1]}
    plan = plan_by_gradients(model, gradients, example, 0.3, steps=100)
    assert plan.count_parameters(model) >= 0.3 * count_encoder_parameters(model)
    fewer = plan_by_gradients(model, gradients, example, 0.1, steps=100)
    products = {parameter: (parameter * gradient).detach() for parameter, gradient in gradients.items()}
    for group in find_groups(model):
        parts = [products[group.writers[0].module.weight].abs().flatten(1).sum(1)]
        parts += [products[group.followers[0].module.weight].abs()]
        parts += [products[group.reader.module.weight].abs().transpose(0, 1).flatten(1).sum(1)]
        removed = plan.removed["channels"].get(group.layer, [])
        assert set(fewer.removed["channels"].get(group.layer, [])) <= set(removed)
        scores = torch.stack(parts).mean(0)
        assert sorted(removed) == sorted(scores.argsort()[: len(removed)].tolist())
    with pytest.raises(ValueError, match="removes less than 99%"):
        plan_by_gradients(model, gradients, example, 0.99)


def test_the_order_of_cells():
    keys = keys_of(list(NETWORKS), list(METHODS), RATIOS, [0, 1, 2, 7], 1024)
    assert len(set(keys)) == len(keys) == 3 * (9 * 3 * 4 + 1)
    assert keys[:2] == [Key("preresnet29", NOTHING, 0.0, 0, 0), Key("preresnet29", DEFAULT, 0.7, 0, 1024)]
    assert {key.seed for key in keys[-60:]} == {7}
    assert keys_of(["resnet56"], [HAP], [0.5], [1], 1024) == [Key("resnet56", HAP, 0.5, 1, 0)]
    with pytest.raises(ValueError, match="no network 'resnet1'"):
        keys_of(["resnet1"], [HAP], [0.5], [0], 1)
    with pytest.raises(ValueError, match="no method 'all'"):
        keys_of(["resnet56"], ["all"], [0.5], [0], 1)


def made_cells():
    """Two seeds of the default method, and Taylor at one ratio."""
    cells = {}
    for method, ratio, seed, after in ((NOTHING, 0.0, 0, 0), (DEFAULT, 0.7, 0, 0.86), (DEFAULT, 0.7, 1, 0.84)):
        key = Key("resnet56", method, ratio, seed, 1024 if ratio else 0)
        cells[key] = {**key._asdict(), "dense": {"accuracy": 0.9}, "seconds": {}, "latency": {}}
        cells[key] |= {"parameters": 1000, "dense_parameters": 2000, "flops": 25e6, "dense_flops": 1e8}
        if ratio:
            cells[key] |= {
                "pruned": {"accuracy": 0.5, "kl": 2},
                "refitted": {"accuracy": after, "kl": 0.1 + seed / 10},
            }
            cells[key] |= {"latency": {"8": 0.6 + 0.2 * seed, "128": 0.5}, "seconds": {"score": 50, "plan": 0}}
    return cells


def test_tables_and_plot(monkeypatch):
    cells = made_cells()
    found = tables.sections(cells, None)
    assert found["dense"].splitlines()[-1] == "| resnet56 | 90.0 | 0.00 million | 25 million |"
    wanted = f"| resnet56 | {DEFAULT} |  | -40.0 → -5.0 (-6.0 to -4.0), KL 0.15 |  |"
    assert found["results"].splitlines()[2:] == [wanted]
    assert found["costs"].splitlines()[2:] == [f"| resnet56 | {DEFAULT} | 25% | 0.70 / 0.50 | 50 + 0 |"]
    assert found["not run"].splitlines()[2] == f"| {DEFAULT} | 50%, 70%, 90% | 50%, 90% | 50%, 70%, 90% |"
    assert f"| {HAP} | {' | '.join(['50%, 70%, 90%'] * 3)} |" in found["not run"]
    everything = {key: None for key in keys_of(list(NETWORKS), list(METHODS), RATIOS, [0], 1024)}
    assert tables.not_run(everything) == "None."
    assert found["precision"].startswith("These figures are open")
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **settings: figures.append(self))
    plot.plot_accuracy(list(cells.values()), "cifar.png")
    (axes,) = figures[0].axes
    line, dense = axes.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[50, 85]])
    np.testing.assert_allclose(dense.get_ydata(), 90)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [DEFAULT]


def test_low_precision(command, tmp_path, monkeypatch):
    monkeypatch.setattr(low_precision.subprocess, "run", run_here)
    output, runs = tmp_path / "precision.json", ["float32", "float32, other probes", "bf16"]
    numbers = ["--images", "8", "--probes", "4", "--runs", *runs]
    low_precision.main([*command[:4], "--output", str(output), *numbers])
    result = json.loads(output.read_text())
    rows = {row["run"]: row for row in result["rows"]}
    assert rows["bf16"]["rank_correlation"] > max(0.9, rows["float32, other probes"]["rank_correlation"])
    lines = tables.precision_table(result).splitlines()
    assert lines[0] == "preresnet29, 4 probes on 8 images."
    assert len(lines) == 7 and lines[4].startswith("| float32 | ") and "| 1.00 | " in lines[4]
    without_peak = tables.precision_table({**result, "rows": [{**result["rows"][0], "peak": 0}]})
    assert "| 0 |  |" in without_peak
    failed = {**result, "rows": [result["rows"][0], {"run": "fp16", "error": "RuntimeError: no such product"}]}
    assert tables.precision_table(failed).splitlines()[-1] == "| fp16 | cannot run here |  |  |  |  |"


def test_the_command_names_what_is_wrong(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", *command, "--methods", "all"])
    with pytest.raises(SystemExit, match="compare_cifar: There is no method 'all'"):
        runpy.run_module("vision_scripts.compare_cifar", run_name="__main__", alter_sys=True)


def test_a_step_of_recovery_is_that_of_adamw(command, monkeypatch):
    """The loss is that of the labels and the distance to the dense network's logits; the dense network stays."""
    args, *_ = study.HfArgumentParser(study.Arguments).parse_args_into_dataclasses(command)
    data, settings = Cifar.load(args.data_dir), Recovery(learning_rate=0.1, batch_size=48, distillation=0.7)
    monkeypatch.setattr(recovery, "augmented", lambda pixels: pixels)
    monkeypatch.setattr(recovery, "bf16_is_fast", lambda: False)
    dense, model = tiny_network(), tiny_network()
    model.classifier.weight.data *= 0.5
    kept, expected = {name: p.clone() for name, p in dense.state_dict().items()}, copy.deepcopy(model).train()
    recover(model, dense, data, None, 1.0, 0, settings)
    batch = data.normalize([data.train[i] for i in range(48)])
    with torch.no_grad():
        wanted = dense(batch["pixel_values"]).logits
    found = expected(batch["pixel_values"]).logits
    logs = [(logits / 4).log_softmax(1) for logits in (found, wanted)]
    distance = 16 * (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
    (0.7 * distance + 0.3 * F.cross_entropy(found, batch["labels"])).backward()
    rate = 0.1 * 0.5 / 0.85  # Of the one step, in the middle of the cycle.
    for (name, after), before in zip(model.named_parameters(), expected.parameters(), strict=True):
        step = before.grad / (before.grad.abs() + 1e-8)  # The first of Adam.
        clear = before.grad.abs() > 1e-5
        wanted = before * (1 - rate * 1e-2) - rate * step
        torch.testing.assert_close(after[clear], wanted[clear], rtol=0, atol=1e-3 * rate, msg=name)
    assert not model.training and not dense.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dense.state_dict().items())


def test_every_image_is_seen_once_an_epoch():
    images = DecodedImages(torch.zeros(10, 3, 2, 2, dtype=torch.uint8), torch.arange(10))
    batches = recovery._drawn(images, 4, 0)
    seen = torch.cat([next(batches).labels for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
