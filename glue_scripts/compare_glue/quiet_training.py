"""Training in studies and benchmarks, whose results are cells."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def quiet_arguments(output_dir: str | Path, **settings: Any) -> TrainingArguments:
    """Arguments of a training that saves, logs and shows nothing.

    Args:
        output_dir (`str` or `Path`): A folder, which stays empty.
        settings: Other fields of `TrainingArguments`.
    """
    return TrainingArguments(
        output_dir=str(output_dir),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
