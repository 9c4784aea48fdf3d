"""`HapConfig`: every knob of pruning, beside `TrainingArguments`."""

from dataclasses import dataclass, field

from .planning import validate_budget
from .sensitivity import METHODS


@dataclass
class HapConfig:
    """Configuration of [`HapTrainer`]. Its fields are also the flags of `run_glue_hap.py`.

    No field shares its name with one of `TrainingArguments`, so both can be read by one `HfArgumentParser`. Random
    probes and the choice of examples are seeded by `TrainingArguments.seed`.

    Parameters that control how much is removed:
        ratio (`float`, *optional*, defaults to 0.4): Share of `budget` to remove, in [0, 1).
        budget (`str`, *optional*, defaults to `"heads"`): What `ratio` is a share of; `"heads"`: attention heads.
        min_heads (`int`, *optional*, defaults to 1): Heads every layer keeps at least. A one-shot ranking of the whole
            model can empty layers, which costs far more accuracy than the scores foresee.

    Parameters that control scoring:
        method (`str`, *optional*, defaults to `"hessian_trace"`): `"hessian_trace"` or `"gradient"`.
        num_probes (`int`, *optional*, defaults to 4): Random probes a batch, for methods that draw any.
        max_examples (`int`, *optional*, defaults to 256): Training examples to score on.

    Parameters that control recovery, the training after pruning:
        recovery_epochs (`float`, *optional*): Epochs of `train()` after `prune()`. By default `num_train_epochs`.
        recovery_learning_rate (`float`, *optional*): Learning rate of `train()` after `prune()`. By default
            `learning_rate`.

    Raises:
        ValueError: If a value is out of range; the message names it.
    """

    ratio: float = field(default=0.4, metadata={"help": "Share of the budget to remove, in [0, 1)."})
    budget: str = field(default="heads", metadata={"help": "What `ratio` is a share of: 'heads'."})
    min_heads: int = field(default=1, metadata={"help": "Heads every layer keeps at least."})
    method: str = field(
        default="hessian_trace", metadata={"help": "How heads are scored: 'hessian_trace' or 'gradient'."}
    )
    num_probes: int = field(default=4, metadata={"help": "Random probes a batch, for methods that draw any."})
    max_examples: int = field(default=256, metadata={"help": "Training examples to score on."})
    recovery_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of training after pruning; by default num_train_epochs."}
    )
    recovery_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of training after pruning; by default learning_rate."}
    )

    def __post_init__(self):
        validate_budget(self.budget, self.ratio, self.min_heads)
        if self.method not in METHODS:
            raise ValueError(f"Unknown sensitivity method '{self.method}'; choose one of {', '.join(METHODS)}.")
        for name in ("num_probes", "max_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("recovery_epochs", "recovery_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
