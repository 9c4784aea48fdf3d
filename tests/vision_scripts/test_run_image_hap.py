"""The main job of image classifiers on small inputs, and its answers to wrong ones."""

import json
import sys

import pytest
import torch
from image_files import class_folders, parquet_folder
from tiny import CIFAR10, needs_cifar10
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hap_transformers import HapTrainer, PruningPlan
from hap_transformers.components.releases import WARMUP_SHARE
from hap_transformers.training.main_job import read_flags
from vision_scripts import run_image_hap
from vision_scripts.image_processors import make_image_processor
from vision_scripts.run_image_hap import ScriptArguments, defaults_for, load_model, main, make_trainer, prepare, run


@pytest.fixture
def vit_dir(tmp_path):
    """The folder of a tiny ViT for images of 8x8 pixels, with an image processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    model.save_pretrained(tmp_path / "vit")
    make_image_processor((8, 8), [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def short(tmp_path, *more):
    """Flags of a short run on the CPU."""
    return ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "True", *map(str, more)]


def trainer_of(command):
    """The trainer of the dense model, before it is pruned."""
    command, script, args, _ = read_flags(ScriptArguments, defaults_for, "", command)
    config, task, inputs = prepare(script, args)
    torch.manual_seed(0)
    return make_trainer(script, args, None, task, inputs, load_model(script, config, None))


def test_a_resnet_learns_the_digits(tmp_path):
    trainer = trainer_of(short(tmp_path, "--num_train_epochs", "2"))
    assert trainer.evaluate()["eval_accuracy"] < 0.3
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.8
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
    assert trainer.optimizer.defaults["nesterov"] and trainer.optimizer.defaults["momentum"] == 0.9
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) > 0.04 and rates[0] < rates[3] > rates[-1] and rates[-1] < 0.005  # One cycle.
    trainer.save_model()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert saved.config.image_size == [8, 8] and saved.config.id2label == {i: str(i) for i in range(10)}
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean[0] == pytest.approx(0.305, abs=0.01)


def test_only_training_images_are_augmented(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vision_scripts.image_trainer.augmented", lambda pixels: seen.append(len(pixels)) or pixels * 0
    )
    trainer = trainer_of(short(tmp_path, "--data_dir", parquet_folder(tmp_path / "data"), "--num_train_epochs", "1"))
    trainer.evaluate()
    assert not seen
    trainer.train()
    assert seen == [24]
    assert not trainer_of(short(tmp_path)).augment
    assert trainer_of(short(tmp_path, "--augment", "True")).augment


def test_a_transformer_end_to_end(tmp_path, vit_dir, capsys):
    data = class_folders(tmp_path / "colours", count=20)
    command = short(tmp_path, "--model_name_or_path", vit_dir, "--data_dir", data, "--learning_rate", "3e-3")
    more = ["--per_device_train_batch_size", "8", "--num_train_epochs", "3", "--budget", "heads", "--ratio", "0.5"]
    results = main([*command, *more])
    out = tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    assert set(results["metrics"]) == {"dense", "pruned", "recovered"} and results["batch"] == [6, 3, 8, 8]
    assert results["components"]["heads"] == {"dense": 8, "pruned": 4}
    assert results["metrics"]["recovered"]["accuracy"] > 0.9 and results["intervals"]["recovered"]["accuracy"]
    assert results["num_examples"] == {"train": 54, "validation": 6} and results["task"] == "colours"
    reloaded = AutoModelForImageClassification.from_pretrained(out)
    assert reloaded.config.pruned_heads == PruningPlan.load(out / "pruning_plan.json").heads
    assert reloaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert list(AutoImageProcessor.from_pretrained(out).image_mean) == [0.5] * 3
    card, page = ((out / name).read_text() for name in ("README.md", "report.html"))
    assert "pipeline_tag: image-classification" in card and str(tmp_path) not in card + page
    assert "import AutoModelForImageClassification" in page and "import ViTForImageClassification" in card
    assert "colours: images of 8x8 pixels, 3 classes" in capsys.readouterr().out


def test_a_model_is_taken_as_it_is_and_goes_on_after_a_kill(tmp_path, vit_dir, monkeypatch, capsys):
    data = class_folders(tmp_path / "colours", count=20)
    command = short(tmp_path, "--model_name_or_path", vit_dir, "--data_dir", data, "--num_train_epochs", "0")
    trained = []
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "train", lambda *args, **kwargs: trained.append(1))
        broken.setattr(HapTrainer, "prune", lambda self, plan: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(command)
    assert not trained and "1. take the model as it is" in capsys.readouterr().out
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "estimate_sensitivity", lambda self: pytest.fail("scored again"))
        results = main(command)
    assert "fine-tune" not in results["seconds"] and set(results["history"]) == {"recover"}
    assert results["model"] == "vit"


@needs_cifar10
def test_dense_weights_are_not_trained(tmp_path):
    weights = CIFAR10 / "dense" / "resnet56.safetensors"
    flags = [
        "--cifar_model",
        "resnet56",
        "--dense_weights",
        weights,
        "--dataset_name",
        "cifar10",
        "--data_dir",
        CIFAR10,
    ]
    command = short(tmp_path, *flags, "--max_train_samples", "20", "--max_eval_samples", "150", "--bf16", "False")
    assert defaults_for(command)["num_train_epochs"] == 0
    trainer = trainer_of(command)
    assert trainer.evaluate()["eval_accuracy"] > 0.82  # On the whole test set it is 0.89.
    assert trainer.model.config.id2label[9] == "truck"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--cifar_model", "resnet18"], "no CIFAR network 'resnet18'; choose one of resnet20"),
        (["--model_name_or_path", "x", "--cifar_model", "resnet20"], "not both"),
        (["--dense_weights", "x"], "needs --cifar_model and --dataset_name"),
        (["--dataset_name", "mnist"], "Unknown data set 'mnist'"),
        (["--data_dir", "nowhere"], "no folder 'nowhere'"),
        (["--image_size", "0"], "--image_size must be positive"),
        (["--max_eval_samples", "0"], "has no validation images"),
        (["--ratio", "1.5"], "`ratio`"),
    ],
)
def test_wrong_flags(tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(short(tmp_path, *more))
    assert not (tmp_path / "out").exists()


def test_an_image_processor_says_the_size(tmp_path, vit_dir):
    data = class_folders(tmp_path / "colours", sizes=((12, 9), (6, 7)))
    command = short(tmp_path, "--model_name_or_path", vit_dir, "--data_dir", data)
    assert trainer_of(command).train_dataset.pixels.shape[1:] == (3, 8, 8)
    with pytest.raises(ValueError, match="has an image processor, which says the size"):
        main([*command, "--image_size", "16"])
    (vit_dir / "preprocessor_config.json").unlink()
    assert trainer_of(command).train_dataset.pixels.shape[1:] == (3, 8, 8)  # What its config says.


def test_errors_are_one_line_after_the_scripts_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_image_hap.py", *short(tmp_path, "--data_dir", "nowhere")])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == "run_image_hap.py: There is no folder 'nowhere' (--data_dir)."


def test_defaults_follow_what_the_command_names():
    digits, files, other = (defaults_for(command) for command in ([], ["--data_dir=x"], ["--model_name_or_path", "x"]))
    assert (files["learning_rate"], files["per_device_train_batch_size"], files["optim"]) == (0.2, 256, "sgd")
    assert digits["learning_rate"] / digits["per_device_train_batch_size"] == pytest.approx(0.2 / 256)
    assert WARMUP_SHARE in files and "optim" not in other and run_image_hap.DEFAULTS == other
