"""Loads, tokenizes and evaluates the GLUE tasks and tasks from custom files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import ClassLabel, DatasetDict, Features, load_dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .custom_files import load_custom_files
from .labels import numbers_in_order, order_of_classes


if TYPE_CHECKING:  # `evaluate` takes seconds to import.
    from .task_metrics import TaskMetrics


# Text columns of each task in nyu-mll/glue.
GLUE_TEXTS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class Task:
    """A loaded text classification or regression task.

    Args:
        name (`str`): A GLUE task's name, `"demo"` or `"custom"`.
        data (`DatasetDict`): Splits `train` and `validation`, each with a `label` column.
        texts (`tuple[str, ...]`): The one or two text columns.
        labels (`list[str]`, *optional*): Names of the classes; `None` for regression.
    """

    name: str
    data: DatasetDict
    texts: tuple[str, ...]
    labels: list[str] | None

    @property
    def num_labels(self) -> int:
        """Number of outputs that a model for this task needs."""
        return len(self.labels) if self.labels else 1

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
        """Turns texts into model inputs without padding."""
        texts, columns = self.texts, [column for column in self.data["train"].column_names if column != "label"]
        return self.data.map(
            lambda rows: tokenizer(*(rows[text] for text in texts), truncation=True, max_length=max_length),
            batched=True,
            remove_columns=columns,
            desc=f"Tokenizing {self.name}",
        )

    def aligned_with(self, config: PretrainedConfig, *, ignore_mismatched_sizes: bool = False) -> "Task":
        """Returns the task with its labels numbered as a checkpoint numbers them, by the names of the classes.

        Args:
            config (`PretrainedConfig`): The checkpoint's config, as it was loaded.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether the checkpoint gets a new head
                where its own has another number of outputs.

        Raises:
            ValueError: If the checkpoint is a classifier with another number of outputs.
        """
        order = order_of_classes(self.labels, config, task=self.name, ignore_mismatched_sizes=ignore_mismatched_sizes)
        if order is None or self.labels is None:
            return self
        numbers = dict(enumerate(numbers_in_order(self.labels, order)))
        features = Features({**self.data["train"].features, "label": ClassLabel(names=order)})
        data = self.data.map(
            lambda rows: {"label": [numbers.get(label, label) for label in rows["label"]]},
            batched=True,
            features=features,
            desc=f"Numbering the labels of {self.name} as the model does",
        )
        return replace(self, data=data, labels=order)

    def metrics(self, metric: str | None = None) -> "TaskMetrics":
        """Returns a function that computes the task's GLUE metrics; the first one is the one to report.

        Args:
            metric (`str`, *optional*): A further metric of the `evaluate` package, reported before them: a Hub name
                or the path of a script.

        Raises:
            ValueError: If that metric cannot be loaded.
        """
        from .task_metrics import TaskMetrics

        if self.name in GLUE_TEXTS:
            return TaskMetrics(self.name, metric)
        return TaskMetrics("classification" if self.labels else "regression", metric)


def load_task(
    task_name: str | None = None,
    data_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    encoding: str | None = None,
) -> Task:
    """Loads a GLUE task from the Hub or from parquet files, or a task from custom CSV or JSON files.

    Args:
        task_name (`str`, *optional*): One of `GLUE_TEXTS`.
        data_dir (`str`, *optional*): Folder with `<task>/train.parquet` and `<task>/validation.parquet`, read instead
            of the Hub. For MNLI the second file is `<task>/validation_matched.parquet`.
        train_file, validation_file (`str`, *optional*): Custom files with a `label` column and one or two text
            columns, each read by its own ending. The task is a regression if the training labels are floating point
            numbers.
        encoding (`str`, *optional*): Encoding of the custom files; by default UTF-8.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the arguments contradict each other, the task is unknown, or a file cannot be read or lacks
            labels or texts.
    """
    if bool(train_file) != bool(validation_file):
        raise ValueError("Pass --train_file and --validation_file together.")
    if train_file and task_name:
        raise ValueError("Pass either --task_name or --train_file and --validation_file, not both.")
    if data_dir and not task_name:
        raise ValueError("--data_dir needs --task_name.")
    if encoding and not train_file:
        raise ValueError("--encoding is that of --train_file and --validation_file; pass them.")
    if train_file and validation_file:
        return Task("custom", *load_custom_files(train_file, validation_file, encoding))
    if task_name not in GLUE_TEXTS:
        raise ValueError(f"Unknown task '{task_name}'; choose one of {', '.join(GLUE_TEXTS)}, or pass custom files.")
    validation = "validation_matched" if task_name == "mnli" else "validation"
    if data_dir is None:
        data = load_dataset("nyu-mll/glue", task_name)
    else:
        files = {split: Path(data_dir) / task_name / f"{split}.parquet" for split in ("train", validation)}
        missing = [str(file) for file in files.values() if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"The data folder lacks {', '.join(missing)}; task '{task_name}' needs them.")
        try:
            data = load_dataset("parquet", data_files={split: str(file) for split, file in files.items()})
        except OSError:  # The cache's folder, not the files.
            raise
        except Exception as error:  # `datasets` wraps what the reader raises.
            named = ", ".join(map(str, files.values()))
            raise ValueError(f"Cannot read {named} as parquet: {error.__cause__ or error}") from error
    data = DatasetDict(train=data["train"], validation=data[validation])
    for split in data.values():
        missing = [column for column in ("label", *GLUE_TEXTS[task_name]) if column not in split.column_names]
        if missing:
            raise ValueError(f"Task '{task_name}' lacks {', '.join(missing)}; its columns are {split.column_names}.")
    label = data["train"].features["label"]
    if task_name != "stsb" and not isinstance(label, ClassLabel):
        raise ValueError(
            f"The labels of task '{task_name}' are {label.dtype} without names. Write the files with `datasets` "
            "(`load_dataset('nyu-mll/glue', ...)['train'].to_parquet(...)`), which keeps them."
        )
    for name, split in data.items():
        if task_name != "stsb" and -1 in split.unique("label"):
            raise ValueError(f"The {name} split of task '{task_name}' has examples without a label (-1); remove them.")
    labels = None if task_name == "stsb" else label.names
    return Task(task_name, data, GLUE_TEXTS[task_name], labels)
