"""Compares the classes of a task with those that a checkpoint's config names."""

from collections.abc import Callable, Sequence

from transformers import PretrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# As it is, without spaces around it, without case.
SPELLINGS: tuple[Callable[[str], str], ...] = (str, str.strip, lambda name: name.strip().casefold())
REMEDY = (
    "Give a checkpoint that was fine-tuned for these classes, or pass --ignore_mismatched_sizes to {script}, which "
    "makes a new classification head."
)
TEXTS = "ForSequenceClassification"
# The scripts that fine-tune models, by the end of the name of their classes.
SCRIPTS = {TEXTS: "run_glue_hap.py", "ForImageClassification": "run_image_hap.py"}


def order_of_classes(
    labels: Sequence[str] | None,
    config: PretrainedConfig,
    *,
    task: str,
    head: str = TEXTS,
    ignore_mismatched_sizes: bool = False,
) -> list[str] | None:
    """Returns the classes of a task in the order of a checkpoint's outputs, spelled as its config does.

    Args:
        labels (`Sequence[str]`, *optional*): Names of the task's classes, in the data's order; `None` for regression.
        config (`PretrainedConfig`): The checkpoint's config, as it was loaded.
        task (`str`): The task's name, for messages.
        head (`str`, *optional*, defaults to `"ForSequenceClassification"`): End of the name of a classifier's class.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether the checkpoint gets a new head where
            its own has another number of outputs.

    Returns:
        `list[str]`: The names, or `None` if the data's order holds: the checkpoint names the same order, other classes
        or none, or it is no classifier yet.

    Raises:
        ValueError: If the checkpoint is a classifier with another number of outputs.
    """
    names = _named_classes(config)
    spelling = common_spelling(names, labels) if labels and names else None
    if labels and names and spelling is not None:
        return names if list(map(spelling, names)) != list(map(spelling, labels)) else None
    known = names is not None and names != _default_names(len(names))
    architectures = config.architectures or ([head] if known else [])
    if not any(name.endswith(head) for name in architectures):
        return None
    ratings = "Write ratings as floating point numbers (1.0) for a regression. " if config.num_labels == 1 else ""
    remedy = ratings + REMEDY.format(script=SCRIPTS[head])
    wanted = f"{len(labels)} ({', '.join(labels)})" if labels else "1 (a regression)"
    found = f" ({', '.join(names)})" if known and names else ""
    model = f"'{config.name_or_path}'" if config.name_or_path else "The model"
    if config.num_labels != (len(labels) if labels else 1):
        if ignore_mismatched_sizes:
            return None
        raise ValueError(f"{model} has {config.num_labels} outputs{found}, task '{task}' needs {wanted}. {remedy}")
    if labels and known and names:
        logger.warning(
            f"{model} names the classes {', '.join(names)}, task '{task}' names {', '.join(labels)}. They are matched "
            "in these orders."
        )
    return None


def numbers_in_order(labels: Sequence[str], order: Sequence[str]) -> list[int]:
    """The number that each class has in the order of [`order_of_classes`]."""
    spelling = common_spelling(order, labels)
    assert spelling is not None  # Else there is no order.
    places = {spelling(name): i for i, name in enumerate(order)}
    return [places[spelling(name)] for name in labels]


def common_spelling(names: Sequence[str], others: Sequence[str]) -> Callable[[str], str] | None:
    """The strictest spelling by which two lists hold the same names, each once; `None` if there is none."""
    for spelling in SPELLINGS:
        first, second = ({spelling(name) for name in both} for both in (names, others))
        if first == second and len(names) == len(others) == len(first):
            return spelling
    return None


def _default_names(count: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(count)]


def _named_classes(config: PretrainedConfig) -> list[str] | None:
    """Names of a config's outputs in their order, by `id2label` or else by `label2id`; `None` if they have gaps."""
    by_output = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    by_name = {int(i): str(name) for name, i in (config.label2id or {}).items()}
    for numbers in (by_output, by_name):
        names = [numbers[i] for i in sorted(numbers)]
        if names and sorted(numbers) == list(range(len(numbers))) and names != _default_names(len(names)):
            return names
    return _default_names(len(by_output)) if by_output else None
