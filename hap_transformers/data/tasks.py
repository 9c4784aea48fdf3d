"""Loads, tokenizes and evaluates the GLUE tasks and tasks from custom files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, DatasetDict, Features, Value, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase


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
        columns = [column for column in self.data["train"].column_names if column != "label"]
        return self.data.map(
            lambda rows: tokenizer(*(rows[text] for text in self.texts), truncation=True, max_length=max_length),
            batched=True,
            remove_columns=columns,
            desc=f"Tokenizing {self.name}",
        )

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Returns a function that computes the task's GLUE metrics; the first one is the one to report."""
        functions = {
            "cola": {"matthews_correlation": matthews_corrcoef},
            "mrpc": {"accuracy": accuracy_score, "f1": f1_score},
            "qqp": {"accuracy": accuracy_score, "f1": f1_score},
        }.get(self.name, {"accuracy": accuracy_score})
        if self.labels is None:
            # If all predictions are equal, the correlation is undefined: scipy returns NaN, which counts as 0.
            functions = {
                "pearson": lambda y, z: np.nan_to_num(pearsonr(y, z)[0]),
                "spearmanr": lambda y, z: np.nan_to_num(spearmanr(y, z)[0]),
            }

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            # Some models, such as encoder-decoders, return more than logits. The logits come first.
            predictions = prediction.predictions
            logits = predictions[0] if isinstance(predictions, tuple) else predictions
            outputs = np.squeeze(logits, -1) if self.labels is None else logits.argmax(-1)
            return {name: float(function(prediction.label_ids, outputs)) for name, function in functions.items()}

        return compute


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    For a folder without a tokenizer, Transformers 4.57 fails. Transformers 5 makes an empty tokenizer, which knows no
    word; this function refuses it.

    Args:
        name (`str`): Hub name or folder of the model.

    Raises:
        ValueError: If the model has no tokenizer.
    """
    remedy = (
        f"'{name}' has no tokenizer that can be loaded. Save the tokenizer of the model's training in that folder by "
        "tokenizer.save_pretrained(...). A trainer does that itself if it was made with processing_class=tokenizer."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{remedy} ({error})") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(remedy)
    return tokenizer


def load_task(
    task_name: str | None = None,
    data_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
) -> Task:
    """Loads a GLUE task from the Hub or from parquet files, or a task from custom CSV or JSON files.

    Args:
        task_name (`str`, *optional*): One of `GLUE_TEXTS`.
        data_dir (`str`, *optional*): Folder with `<task>/train.parquet` and `<task>/validation.parquet`, read instead
            of the Hub. For MNLI the second file is `<task>/validation_matched.parquet`.
        train_file, validation_file (`str`, *optional*): Custom files with a `label` column and one or two text
            columns. The task is a regression if the labels are floating point numbers.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the arguments contradict each other, the task is unknown, or a file has no labels or no texts.
    """
    if bool(train_file) != bool(validation_file):
        raise ValueError("Pass --train_file and --validation_file together.")
    if train_file and task_name:
        raise ValueError("Pass either --task_name or --train_file and --validation_file, not both.")
    if data_dir and not task_name:
        raise ValueError("--data_dir needs --task_name.")
    if train_file and validation_file:
        return _own_task({"train": train_file, "validation": validation_file})
    if task_name not in GLUE_TEXTS:
        raise ValueError(f"Unknown task '{task_name}'; choose one of {', '.join(GLUE_TEXTS)}, or pass custom files.")
    validation = "validation_matched" if task_name == "mnli" else "validation"
    if data_dir is None:
        data = load_dataset("nyu-mll/glue", task_name)
    else:
        files = {split: Path(data_dir) / task_name / f"{split}.parquet" for split in ("train", validation)}
        missing = [str(file) for file in files.values() if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"--data_dir lacks {', '.join(missing)}; task '{task_name}' needs them.")
        data = load_dataset("parquet", data_files={split: str(file) for split, file in files.items()})
    data = DatasetDict(train=data["train"], validation=data[validation])
    label = data["train"].features.get("label")
    if label is None:
        raise ValueError(f"Task '{task_name}' has no 'label' column, only {data['train'].column_names}.")
    if task_name != "stsb" and not isinstance(label, ClassLabel):
        raise ValueError(
            f"The labels of task '{task_name}' are {label.dtype} without names. Write the files with `datasets` "
            "(`load_dataset('nyu-mll/glue', ...)['train'].to_parquet(...)`), which keeps them."
        )
    labels = None if task_name == "stsb" else label.names
    return Task(task_name, data, GLUE_TEXTS[task_name], labels)


def _own_task(files: dict[str, str]) -> Task:
    for file in files.values():
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file '{file}'.")
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(files["train"]).suffix)
    if kind is None:
        raise ValueError(f"'{files['train']}' is neither CSV nor JSON; expected .csv, .json or .jsonl.")
    data = load_dataset(kind, data_files=files)
    features = data["train"].features
    strings = [
        name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    texts = tuple(name for name in strings if name != "label")
    if "label" not in features or not texts:
        raise ValueError(
            f"'{files['train']}' has columns {list(features)}; it needs 'label' and one or two text columns."
        )
    if len(texts) > 2:
        raise ValueError(f"'{files['train']}' has the text columns {texts}; keep the one or two to classify.")
    if not isinstance(features["label"], Value):
        raise ValueError(
            f"The labels of '{files['train']}' are {features['label']}; each row needs one number or word."
        )
    for split, file in files.items():
        for column in ("label", *texts):
            if None in (values := data[split][column]):
                raise ValueError(f"'{file}' has no {column} in row {list(values).index(None) + 1}; fill or remove it.")
    if features["label"].dtype.startswith("float"):
        return Task("custom", data, texts, labels=None)
    # Numbers are sorted by value, words alphabetically.
    names = [str(label) for label in sorted(set(data["train"]["label"]))]
    unknown = {str(label) for label in data["validation"]["label"]} - set(names)
    if unknown:
        raise ValueError(f"'{files['validation']}' has labels that '{files['train']}' lacks: {sorted(unknown)}.")
    features = Features({**features, "label": ClassLabel(names=names)})
    data = data.map(lambda row: {"label": names.index(str(row["label"]))}, features=features)
    return Task("custom", data, texts, labels=names)
