"""`HapConfig`: every knob of pruning, beside `TrainingArguments`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..planning.kinds import kinds_to_prune
from ..planning.settings import PlanningSettings
from ..sensitivity import METHODS, validate_scoring
from ..sensitivity.output_curvature import EXACT_DIRECTIONS


RECOVERY_CHECKS = ("held_out", "eval", "none")


@dataclass
class HapConfig(PlanningSettings):
    """Configuration of [`HapTrainer`]. Its fields are also the flags of `run_glue_hap.py`.

    `HapConfig(ratio=0.6)` is enough to start. No field shares its name with one of `TrainingArguments`, so one
    `HfArgumentParser` can read both. `TrainingArguments.seed` seeds the random probes and the choice of examples.

    Parameters that control how much is removed and what may go: `budget`, `ratio`, `min_heads`, `min_neurons`,
    `neuron_multiple`, `weigh_costs`, `implant_ratio` and `latency_mode`, as in [`PlanningSettings`], and:

    Parameters that control which kinds of component go:
        components (`list[str]`, *optional*): Kinds that are scored and may go, such as `["heads", "neurons"]` or
            `["query_key_dims", "value_dims", "neurons"]`. By default dimensions of heads and neurons for
            `method="kronecker"`, unless the model has rotary embeddings, `min_heads` or `uniform` is set, or a latency
            budget cannot time narrower heads (encoder-decoders, layers of several sizes); otherwise whole heads and
            neurons. A budget named after a kind is for that kind alone. Where dimensions of heads may go,
            heads are aligned before they are scored ([`align_heads`]).

        trim_vocabulary (`bool`, *optional*, defaults to `False`): Whether [`HapTrainer`], when it is made, removes
            tokens from model and tokenizer that the training set does not use ([`trim_vocabulary`]), and renumbers
            those of its data sets. It needs `processing_class`, and data sets of tokens.

    Parameters that control what costs are counted for:
        sequence_length (`int`, *optional*): Length of the text inputs that FLOPs and latency are counted for, one at a
            time. By default that of a batch of training examples.

    Parameters that control scoring ([`estimate_sensitivity`]):
        method (`str`, *optional*, defaults to `"kronecker"`): One of `hap_transformers.METHODS`.
        num_probes (`int`, *optional*, defaults to 4): Random probes per batch, for methods that draw any.
        exact_directions (`int`, *optional*, defaults to 16): Directions of an example's outputs, C - 1 of C classes,
            up to which scoring backpropagates all of them in place of random mixtures.
        max_examples (`int`, *optional*, defaults to 1024): Training examples to score on.
        tolerance (`float`, *optional*): Stop scoring as soon as the ranking's split-half reliability reaches this.
        max_memory (`str`, *optional*): Bytes, such as `"4GB"`, that scoring's sums and the refit's hidden states may
            take beside the model. Layers are scored in parts that fit; hidden states beyond it are temporary files.

    Parameters that control what comes in place of what was removed:
        refit (`bool`, *optional*, defaults to `True`): Whether to refit what is left ([`reconstruct`]).
        refit_examples (`int`, *optional*, defaults to 4096): Training examples to refit on. More than
            `max_examples` are read only up to 131,072 tokens in all.
        ridge (`float`, *optional*): Strength of the refit's regularization. By default 0.01, and 1 for causal language
            models.
        tuning_epochs (`int`, *optional*): Epochs for which every layer is trained for itself after the refit, on the
            same examples and without labels ([`tune_layers`]). By default 3, and 0 where there is no refit or layers
            share weights (ALBERT). 0 halves the time of pruning.
        implant_init (`str`, *optional*, defaults to `"regression"`): What implants start from: `"regression"` on what
            the kept neurons miss, or on what the larger filters give, or, where `refit` is off, `"zero"` as in HAP.

    Parameters that control recovery, the training after pruning:
        recovery_epochs (`float`, *optional*): Epochs of `train()` after `prune()`. By default `num_train_epochs`.
        recovery_learning_rate (`float`, *optional*): Learning rate of `train()` after `prune()`. By default
            `learning_rate`.
        distillation (`float`, *optional*, defaults to 0.5): Weight, in [0, 1], of the loss that draws logits, or
            embeddings of models without a head, to the dense model's, against the loss of the labels. 1 needs no
            labels; 0 saves the dense model's memory and forward passes.
        distillation_temperature (`float`, *optional*, defaults to 2.0): What logits are divided by there.
        distillation_hidden (`float`, *optional*, defaults to 0.0): Weight of the additional loss that draws every
            layer's hidden states to the dense model's.
        recovery_dropout (`bool`, *optional*, defaults to `False`): Whether `train()` after `prune()` uses the model's
            dropout and stochastic depth. A small model that follows a dense one needs none.
        recovery_check (`str`, *optional*, defaults to `"held_out"`): What `train()` after `prune()` is judged by. The
            weights that are best there are kept, be it those from before. `"held_out"` is the distance to the dense
            model on a twentieth of the training examples, at most 512, which neither refit nor recovery see; `"eval"`
            is the same on the evaluation set, without its labels; `"none"` leaves the model as it is after the last
            step. With `load_best_model_at_end` the training arguments' metric judges instead.

    Raises:
        ValueError: If a value is no number or out of range, or components do not suit each other, the method or the
            budget; the message names it.
    """

    components: list[str] | None = field(
        default=None,
        metadata={
            "help": "Kinds that may go, such as heads neurons; by default query_key_dims value_dims neurons for "
            "kronecker, otherwise heads neurons."
        },
    )
    trim_vocabulary: bool = field(
        default=False, metadata={"help": "Remove tokens that the texts do not use from tokenizer and model, before."}
    )
    sequence_length: int | None = field(
        default=None, metadata={"help": "Length of inputs that FLOPs and latency are counted for."}
    )
    method: str = field(default="kronecker", metadata={"help": f"How to score: {', '.join(METHODS)}."})
    num_probes: int = field(default=4, metadata={"help": "Random probes per batch, for methods that draw any."})
    exact_directions: int = field(
        default=EXACT_DIRECTIONS,
        metadata={"help": "Directions of outputs, C - 1 of C classes, up to which all are used in place of probes."},
    )
    max_examples: int = field(default=1024, metadata={"help": "Training examples to score on."})
    tolerance: float | None = field(
        default=None, metadata={"help": "Stop scoring as soon as the ranking's reliability reaches this."}
    )
    max_memory: str | None = field(
        default=None, metadata={"help": "Memory for scoring's sums and the refit's hidden states, such as 4GB."}
    )
    refit: bool = field(default=True, metadata={"help": "Refit what is left in closed form."})
    refit_examples: int = field(
        default=4096, metadata={"help": "Examples to refit on; fewer if they have more than 131,072 tokens."}
    )
    tuning_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs of training every layer for itself after the refit, without labels; by default 3, and 0 "
            "where layers share weights. 0 halves the time of pruning."
        },
    )
    ridge: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the refit's regularization; by default 0.01, and 1 for causal language models."
        },
    )
    implant_init: str = field(default="regression", metadata={"help": "What implants start from: regression or zero."})
    recovery_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of training after pruning; by default num_train_epochs."}
    )
    recovery_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of training after pruning; by default learning_rate."}
    )
    distillation: float = field(
        default=0.5, metadata={"help": "Weight of the dense model's logits against the labels, in [0, 1]."}
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "What logits are divided by."})
    distillation_hidden: float = field(default=0.0, metadata={"help": "Weight of the dense model's hidden states."})
    recovery_dropout: bool = field(default=False, metadata={"help": "Train after pruning with dropout."})
    recovery_check: str = field(
        default="held_out", metadata={"help": f"What recovery is judged by: {', '.join(RECOVERY_CHECKS)}."}
    )

    def __post_init__(self):
        super().__post_init__()
        validate_scoring(
            *(self.method, self.num_probes, self.tolerance, self.max_examples, self.max_memory, self.exact_directions)
        )
        kinds_to_prune(self.components, self.method, self)
        if self.refit_examples < 1:
            raise ValueError(f"`refit_examples` must be at least 1, got {self.refit_examples}.")
        if self.tuning_epochs is not None and (self.tuning_epochs < 0 or (self.tuning_epochs and not self.refit)):
            raise ValueError(
                f"`tuning_epochs` must not be negative and needs refit=True, got {self.tuning_epochs} with "
                f"refit={self.refit}."
            )
        for name in ("recovery_epochs", "recovery_learning_rate", "sequence_length", "distillation_temperature"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("ridge", "distillation_hidden"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"`distillation` is a weight and must be in [0, 1], got {self.distillation}.")
        if self.implant_ratio and self.refit != (self.implant_init == "regression"):
            raise ValueError(
                "implant_init='regression' requires refit=True; 'zero' requires refit=False, because the refit would "
                "overwrite it."
            )
        if self.recovery_check not in RECOVERY_CHECKS:
            choices = ", ".join(f"'{name}'" for name in RECOVERY_CHECKS)
            raise ValueError(f"Unknown recovery_check '{self.recovery_check}'; choose from {choices}.")
        if self.implant_init not in ("regression", "zero"):
            raise ValueError(f"Unknown implant_init '{self.implant_init}'; choose 'regression' or 'zero'.")

    @property
    def distils(self) -> bool:
        """Whether recovery needs the dense model."""
        return self.distillation > 0 or self.distillation_hidden > 0

    def save(self, path: str | Path) -> None:
        """Writes the configuration as JSON. `HfArgumentParser` reads it, too."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HapConfig":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a configuration, or a value is out of range.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a HapConfig: {error}") from error

    @classmethod
    def paper(cls, **changes: Any) -> "HapConfig":
        """The recipe of [HAP](https://arxiv.org/abs/2101.08940), taken literally, for comparison.

        One global one-shot ranking by the relative trace of Hutchinson's Hessian, no floors but the twentieth of its
        channels that a layer keeps, no refit, implants that start from zero for the most sensitive tenth of what goes,
        no distillation. On small Transformers it can empty whole layers. Networks whose convolutions have no larger
        filters take no implants: set `implant_ratio=0`.

        Args:
            changes: Fields to set otherwise.
        """
        recipe = {
            "method": "hessian_trace",
            "min_heads": 0,
            "min_neurons": 0.0,
            "neuron_multiple": 1,
            "weigh_costs": False,
            "refit": False,
            "implant_ratio": 0.1,
            "implant_init": "zero",
            "distillation": 0.0,
        }
        return cls(**{**recipe, **changes})
