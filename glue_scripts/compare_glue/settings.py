"""How the models of the study are trained."""

from dataclasses import dataclass


@dataclass
class Setting:
    """How a task is trained.

    Args:
        examples (`int`, *optional*): Training examples; by default all.
        epochs (`int`): Epochs of fine-tuning.
        held_out (`int`, *optional*): Examples that a fold holds out; by default a fifth.
        fold_words (`int`, *optional*): A fold holds out only examples with at least this many words. Training then
            leaves out all examples that contain a held-out one or are contained in one. This is for tasks whose
            examples are parts of one another's sentences.
        grouped (`bool`): Whether the examples of a batch have similar lengths, which saves padding. STS-B must not
            have such batches: examples of one length come mostly from one source, and the sources differ in their
            scores. Training on such batches diverges.
    """

    examples: int | None
    epochs: int
    held_out: int | None = None
    fold_words: int | None = None
    grouped: bool = True


@dataclass(frozen=True)
class CommonSettings:
    """What all methods of a comparison have in common.

    Args:
        refit_examples (`int`, *optional*, defaults to 1024): Examples to refit on; by default those that are scored.
        recovery_steps (`int`, *optional*, defaults to 100): Batches to recover on. The study has hundreds of cells, so
            they are few.
        recovery_learning_rate (`float`, *optional*, defaults to 5e-5): The highest learning rate of the recovery.
        train_examples (`int`, *optional*): Examples that models train on; by default those of the task's setting.

    Raises:
        ValueError: If a number is not positive.
    """

    refit_examples: int = 1024
    recovery_steps: int = 100
    recovery_learning_rate: float = 5e-5
    train_examples: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


COMMON = CommonSettings()


# Few examples and epochs, so that the full preset takes hours on two cores.
SETTINGS = {
    "mrpc": Setting(None, 3),
    "sst2": Setting(10_000, 2, held_out=3_000, fold_words=12),
    "cola": Setting(None, 3),
    "stsb": Setting(None, 2, grouped=False),
}

# The warmup is for the classifier, whose weights start at random.
WARMUP_STEPS = 50
# Whole heads, so that all methods choose among the same components, but for one that is named after dimensions.
COMPONENTS = ["heads", "neurons"]
# Nearly all examples of these tasks are shorter.
MAX_LENGTH = 128
# The file of scores in the folder of a way to score.
SCORES = "sensitivity.safetensors"
