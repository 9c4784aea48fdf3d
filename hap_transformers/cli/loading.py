"""What the commands of `hap` load: models, and training examples."""

import sys
from pathlib import Path

import datasets
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..data.calibration import calibration_batches
from ..data.tasks import load_task, load_tokenizer


def load_model(name: str, device: str | None = None) -> PreTrainedModel:
    """Loads a model of the class that its config names.

    Args:
        name (`str`): Hub name or folder.
        device (`str`, *optional*): Where to put it; by default on a GPU where there is one.

    Raises:
        FileNotFoundError: If there is no such model.
        RuntimeError: If there is no such device.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"There is no folder '{name}', nor a model of that name on the Hub: {error}"
        ) from error
    known = [own for own in config.architectures or () if hasattr(transformers, own)]
    model_class = getattr(transformers, known[0]) if known else transformers.AutoModel
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model_class.from_pretrained(name).to(device).eval()


def training_batches(
    name: str,
    model: PreTrainedModel,
    task_name: str | None,
    data_dir: str | None,
    train_file: str | None,
    max_examples: int,
    batch: int,
    length: int,
    seed: int,
) -> DataLoader:
    """Training examples of a task that a model was fine-tuned for.

    Raises:
        ValueError: If no data are named, the model is no classifier, does not fit the task, or has no tokenizer.
    """
    if not (task_name or train_file):
        raise ValueError("Say which data: --task with a GLUE task, or --train-file with your own.")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"'{name}' is a {type(model).__name__}, not a model that was fine-tuned to classify texts: it has no loss "
            "on this task. Fine-tune it first, or score it in Python with a loss of your own (`loss_fn`)."
        )
    task = load_task(task_name, data_dir, train_file, train_file)
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"'{name}' has {model.config.num_labels} outputs, task '{task.name}' needs {task.num_labels}. Give a "
            "model that was fine-tuned for the task."
        )
    own = [str(label).lower() for _, label in sorted((model.config.id2label or {}).items())]
    labels = [label.lower() for label in task.labels or ()]
    if own != labels and sorted(own) == sorted(labels):
        raise ValueError(
            f"'{name}' numbers the classes {', '.join(own)}, task '{task.name}' {', '.join(labels)}: examples would "
            "be scored with wrong labels. Score in Python, on examples labelled as the model's config says."
        )
    tokenizer = load_tokenizer(name)
    rows = task.tokenize(tokenizer, length)["train"]
    return calibration_batches(rows, max_examples, seed, batch, DataCollatorWithPadding(tokenizer))
