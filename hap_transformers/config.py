"""`HapConfig`: every knob of pruning, beside `TrainingArguments`."""

from dataclasses import dataclass, field

from .planning import validate_budget
from .sensitivity import METHODS, validate_scoring


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
        method (`str`, *optional*, defaults to `"gauss_newton_trace"`): One of `hap_transformers.METHODS`; see
            [`estimate_sensitivity`].
        num_probes (`int`, *optional*, defaults to 4): Random probes a batch, for methods that draw any.
        max_examples (`int`, *optional*, defaults to 512): Training examples to score on.
        tolerance (`float`, *optional*): Stop scoring as soon as the ranking's split-half reliability reaches this.

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
        default="gauss_newton_trace", metadata={"help": f"How heads are scored: {', '.join(METHODS)}."}
    )
    num_probes: int = field(default=4, metadata={"help": "Random probes a batch, for methods that draw any."})
    max_examples: int = field(default=512, metadata={"help": "Training examples to score on."})
    tolerance: float | None = field(
        default=None, metadata={"help": "Stop scoring as soon as the ranking's reliability reaches this."}
    )
    recovery_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of training after pruning; by default num_train_epochs."}
    )
    recovery_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of training after pruning; by default learning_rate."}
    )

    def __post_init__(self):
        validate_budget(self.budget, self.ratio, self.min_heads)
        validate_scoring(self.method, self.num_probes, self.tolerance, self.max_examples)
        for name in ("recovery_epochs", "recovery_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
