"""What the commands load: models, tokenizers and training examples."""

import sys
from contextlib import suppress
from pathlib import Path

import datasets
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..data.calibration import calibration_batches


def load_model(name: str, device: str | None = None) -> PreTrainedModel:
    """Loads a model of the class that its config names.

    Args:
        name (`str`): Hub name or folder.
        device (`str`, *optional*): Where to put it; by default on a GPU if there is one.

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
    known = [class_name for class_name in config.architectures or () if hasattr(transformers, class_name)]
    model_class = getattr(transformers, known[0]) if known else transformers.AutoModel
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model_class.from_pretrained(name).to(device).eval()


def saved_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, or `None` if it has none or does not take texts."""
    # Scikit-learn and SciPy take seconds to import, which commands without data need not wait for.
    from ..data.tasks import load_tokenizer

    if model.main_input_name == "input_ids":
        with suppress(ValueError):
            return load_tokenizer(name)
    return None


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
    """Training examples of the task that a model was fine-tuned for.

    Raises:
        ValueError: If no data are named, the model is no classifier, does not fit the task, or has no tokenizer.
    """
    from ..data.tasks import load_task, load_tokenizer  # See `saved_tokenizer`.

    if not (task_name or train_file):
        raise ValueError("No data are named; pass --task with a GLUE task, or --train-file with a custom file.")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"'{name}' is a {type(model).__name__}, not a model that was fine-tuned to classify texts: it has no loss "
            "on this task. Fine-tune it first, or score it in Python with a custom loss (`loss_fn`)."
        )
    task = load_task(task_name, data_dir, train_file, train_file)
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"'{name}' has {model.config.num_labels} outputs, task '{task.name}' needs {task.num_labels}. Give a "
            "model that was fine-tuned for the task."
        )
    classes = [str(label).lower() for _, label in sorted((model.config.id2label or {}).items())]
    labels = [label.lower() for label in task.labels or ()]
    if classes != labels and sorted(classes) == sorted(labels):
        raise ValueError(
            f"'{name}' numbers the classes {', '.join(classes)}, task '{task.name}' {', '.join(labels)}: examples "
            "would be scored with wrong labels. Score in Python, on examples labelled as the model's config says."
        )
    tokenizer = load_tokenizer(name)
    rows = task.tokenize(tokenizer, length)["train"]
    return calibration_batches(rows, max_examples, seed, batch, DataCollatorWithPadding(tokenizer))
