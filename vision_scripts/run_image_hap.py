"""Trains, scores, prunes and recovers an image classifier, and saves the smaller model.

With no arguments a ResNet-20 learns the digits of scikit-learn. A run that was killed continues by the same command.
Other uses:

    python vision_scripts/run_image_hap.py --data_dir PARQUET_FOLDER --num_train_epochs 30 --output_dir out
    python vision_scripts/run_image_hap.py --cifar_model preresnet29 --dense_weights dense.safetensors \
        --dataset_name cifar10 --output_dir out
    python vision_scripts/run_image_hap.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --data_dir FOLDER_OF_CLASS_FOLDERS --output_dir out
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)


if __name__ == "__main__":  # Python finds imports beside a script, not in the folder above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hap_transformers import HapConfig
from hap_transformers.components.releases import WARMUP_SHARE
from hap_transformers.data.task_metrics import TaskMetrics
from hap_transformers.reporting.results import public_name
from hap_transformers.training.main_job import (
    COMMON_DEFAULTS,
    finish_job,
    load_classifier,
    load_dense_config,
    name_labels,
    named_flags,
    read_flags,
    refuse_to_replace,
    run_from_shell,
)
from hap_transformers.training.stages import Stages
from vision_scripts.cifar_configs import CIFAR_NETWORKS, CifarResNetConfig, cifar_config
from vision_scripts.cifar_weights import load_dense_weights
from vision_scripts.image_data import DATASETS, ImageTask, load_image_task
from vision_scripts.image_inputs import ImageInputs, make_inputs
from vision_scripts.image_processors import load_image_processor
from vision_scripts.image_trainer import ImageTrainer


# Defaults for images on a small machine, where they differ from those of TrainingArguments and HapConfig.
DEFAULTS = {
    **COMMON_DEFAULTS,
    "output_dir": "outputs/image_demo",
    "num_train_epochs": 2.0,
    "recovery_epochs": 1.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
# Networks for small images are trained by SGD. The rate rises to its peak and falls to zero again: one cycle.
CIFAR_DEFAULTS = {
    "optim": "sgd",
    "learning_rate": 0.2,
    "weight_decay": 5e-4,
    "max_grad_norm": 0.0,
    WARMUP_SHARE: 0.25,
    "num_train_epochs": 5.0,
    "recovery_learning_rate": 0.02,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
}
# There are so few digits that smaller batches are as fast; the rate is the same per image.
DIGITS_DEFAULTS = {"num_train_epochs": 10.0, "per_device_train_batch_size": 64, "learning_rate": 0.05}
AUTO_LOADER = "transformers.AutoModelForImageClassification"
DEFAULT_NETWORK = "resnet20"


@dataclass
class ScriptArguments:
    """Which model and which data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a supported image classifier, or of its encoder."}
    )
    cifar_model: str | None = field(
        default=None,
        metadata={"help": f"A network for small images: {', '.join(CIFAR_NETWORKS)}; by default {DEFAULT_NETWORK}."},
    )
    dense_weights: str | None = field(
        default=None,
        metadata={"help": "safetensors file with trained weights of that network, which is then not trained."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(DATASETS)}; by default the digits of scikit-learn, or --data_dir."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with parquet files, or with a folder of images a class, read instead of the Hub."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this height and width, where the model has no image processor."},
    )
    augment: bool | None = field(
        default=None, metadata={"help": "Shift and flip training images; by default all but digits."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "A metric of the `evaluate` package, reported before accuracy: the path of a script, or a name on "
            "the Hub. Its code runs."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new head where the checkpoint's has another number of labels."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images, drawn by seed."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate on this many images, drawn by seed."}
    )

    def __post_init__(self):
        network = "--cifar_model" if self.cifar_model else "--dense_weights"
        if self.model_name_or_path and (self.cifar_model or self.dense_weights):
            raise ValueError(f"Pass either --model_name_or_path or {network}, not both.")
        if self.dense_weights and not (self.cifar_model and self.dataset_name):
            raise ValueError(
                "--dense_weights needs --cifar_model and --dataset_name, by which it was trained: the one says its "
                "layers, the other how colours are normalized."
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size must be positive, got {self.image_size}.")
        if not self.model_name_or_path:
            self.cifar_model = self.cifar_model or DEFAULT_NETWORK
            cifar_config(self.cifar_model)  # Refuses other names.


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the whole job and returns the fields of `results.json`."""
    command, script, args, hap_config = read_flags(ScriptArguments, defaults_for, __doc__.splitlines()[0], arguments)
    set_seed(args.seed)
    refuse_to_replace(Path(args.output_dir), script.model_name_or_path)
    config, task, inputs = prepare(script, args)
    with args.main_process_first(local=False, desc="looking for what an earlier run has finished"):
        stages = Stages(Path(args.output_dir), command)
    model = load_model(script, config, stages.dense if stages.fine_tuned else None)
    trainer = make_trainer(script, args, hap_config, task, inputs, model)
    about = {"dataset": task.name, "dataset_tags": task.known.hub if task.known else None}
    name = public_name(script.model_name_or_path) if script.model_name_or_path else str(script.cifar_model)
    own = isinstance(config, CifarResNetConfig)
    loader = f"{type(model).__module__}.{type(model).__name__}" if own else AUTO_LOADER
    return finish_job(trainer, stages, task=task.name, model=name, loader=loader, **about)


def defaults_for(command: list[str]) -> dict[str, Any]:
    """Defaults of the flags, by the model and the data that the command names."""
    named = named_flags(command)
    if "--model_name_or_path" in named:
        return DEFAULTS
    digits = {} if named & {"--dataset_name", "--data_dir"} else DIGITS_DEFAULTS
    trained = {"num_train_epochs": 0.0} if "--dense_weights" in named else {}
    return {**DEFAULTS, **CIFAR_DEFAULTS, **digits, **trained}


def prepare(script: ScriptArguments, args: TrainingArguments) -> tuple[PretrainedConfig, ImageTask, ImageInputs]:
    """Loads the config and the data, with the classes and the sizes that belong together.

    Raises:
        ValueError: If they do not, or the data are wrong.
    """
    config: PretrainedConfig
    task = load_image_task(script.dataset_name, script.data_dir)
    processor = None
    if script.model_name_or_path:
        config = load_dense_config(script.model_name_or_path)
        task = task.aligned_with(config, ignore_mismatched_sizes=script.ignore_mismatched_sizes)
        processor = load_image_processor(script.model_name_or_path)
        if processor is not None and script.image_size is not None:
            raise ValueError(
                f"'{script.model_name_or_path}' has an image processor, which says the size of images; leave out "
                "--image_size."
            )
        size = script.image_size or getattr(config, "image_size", None)
    else:
        config, size = cifar_config(str(script.cifar_model)), script.image_size
    name_labels(config, task.name, task.labels)
    limits = {"train": script.max_train_samples, "validation": script.max_eval_samples}
    inputs = make_inputs(task, limits, args.seed, processor, size)
    if isinstance(config, CifarResNetConfig):
        config.image_size = list(inputs.size)
    if args.process_index == 0:
        height, width = inputs.size
        print(f"{task.name}: images of {height}x{width} pixels, {len(task.labels)} classes")
    return config, task, inputs


def load_model(script: ScriptArguments, config: PretrainedConfig, finished: Path | None) -> PreTrainedModel:
    """Loads or makes the model to train, or loads the one that an earlier run has trained.

    Args:
        script (`ScriptArguments`): Names the model.
        config (`PretrainedConfig`): Its config.
        finished (`Path`, *optional*): Folder of the model of an earlier run.

    Raises:
        ValueError: If weights cannot be loaded.
    """
    name, flag = config.name_or_path, script.ignore_mismatched_sizes
    if finished is not None or script.model_name_or_path:
        folder = finished or str(script.model_name_or_path)
        model = load_classifier(AutoModelForImageClassification, folder, config, flag)
        model.config.name_or_path = name  # Not the folder of an earlier run.
        return model
    model = AutoModelForImageClassification.from_config(config)
    if script.dense_weights:
        load_dense_weights(model, script.dense_weights)
    return model


def make_trainer(
    script: ScriptArguments,
    args: TrainingArguments,
    hap_config: HapConfig | None,
    task: ImageTask,
    inputs: ImageInputs,
    model: PreTrainedModel,
) -> ImageTrainer:
    """Makes the trainer of a model; without `hap_config` it only trains."""
    with args.main_process_first(local=False, desc="loading the metric"):
        metrics = TaskMetrics("classification", script.metric)
    metrics.validate(inputs.validation.labels)
    return ImageTrainer(
        model=model,
        args=args,
        train_dataset=inputs.train,
        eval_dataset=inputs.validation,
        data_collator=inputs.collator,
        compute_metrics=metrics,
        processing_class=inputs.processor,
        hap_config=hap_config,
        augment=task.natural if script.augment is None else script.augment,
    )


def run() -> None:
    """Runs the job from the shell."""
    run_from_shell(main, "run_image_hap.py")


if __name__ == "__main__":
    run()
