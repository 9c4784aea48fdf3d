"""The stages of a whole run, from fine-tuning to recovery. A run that is killed continues by the same command."""

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..alignment.basis_name import take_bases
from ..components.structure import rebuild_structure, recorded_structure
from ..files import write_text
from ..planning.kinds import kinds_to_prune
from ..refit.tune_layers import epochs_to_tune
from ..reporting.wording import words_for
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from .resuming import RECOVERY, last_whole_checkpoint
from .trainer import HapTrainer


# What a trainer's results hold by phase.
RESULTS = ("metrics", "intervals")
# Steps after which the length of a run is estimated: enough to time, within the first half minute.
OUTLOOK_STEPS = 12
# A step of recovery runs the dense model, too, without a backward pass: a third more.
TEACHER_STEPS = 4 / 3
# What a batch takes in training steps: to score it some backward passes, to refit on it five forward passes.
SCORING_STEPS, REFIT_STEPS = 3, 2


class Stages:
    """Keeps the fine-tuned model and its scores until the run ends, in a folder within the output folder.

    Pruning and the refit are repeated after a kill: they take less time than the stages before them, and their result
    is the same each time. Training continues from `Trainer`'s checkpoints where `--save_strategy` asks for any; else
    it starts again.

    Args:
        output (`Path`): The run's output folder.
        command (`Sequence[str]`): The run's flags. What a run with other flags has left is deleted.

    Attributes:
        dense (`Path`): The folder of the fine-tuned model.
        fine_tuned (`bool`): Whether an earlier run has finished the fine-tuning.

    Raises:
        ValueError: If the output folder has checkpoints of another run, which this one would mistake for its own.
    """

    def __init__(self, output: Path, command: Sequence[str]):
        self.output, self.folder = output, output / "_unfinished_run"
        self.dense, self._scores = self.folder / "dense", self.folder / "sensitivity.safetensors"
        self._aligned = self.folder / "aligned"
        self._command = self.folder / "command.json"
        if not self._has(command):
            self._start(command)
        self.fine_tuned = self.dense.exists()

    def checkpoint(self, folder: str = "") -> str | None:
        """Returns the last whole checkpoint in a folder of the output folder, if there is any."""
        return last_whole_checkpoint(self.output / folder)

    def save_dense(self, trainer: HapTrainer, **figures: Any) -> None:
        """Saves the fine-tuned model, and figures about it."""
        self._save_model(trainer, self.dense, figures)

    def _save_model(self, trainer: HapTrainer, folder: Path, figures: dict[str, Any]) -> None:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        trainer.save_model(str(unfinished), _internal_call=True)  # Else it is pushed to the Hub, too.
        if trainer.is_world_process_zero():
            write_text(unfinished / "figures.json", json.dumps(figures))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        trainer.accelerator.wait_for_everyone()

    def figures(self) -> dict[str, Any]:
        """Returns the figures that `save_dense` got."""
        return json.loads((self.dense / "figures.json").read_text(encoding="utf-8"))

    def scores(self, trainer: HapTrainer) -> Sensitivity:
        """Returns the saved scores of the trainer's dense model, or else scores it and saves them.

        Scores of dimensions are those of aligned heads: then the trainer's model gets their weights, which are saved,
        too.
        """
        model = cast(PreTrainedModel, trainer.model)
        if self._scores.exists():
            sensitivity = Sensitivity.load(self._scores)
            if sensitivity.basis:
                aligned = type(model).from_pretrained(self._aligned)
                if (structure := recorded_structure(aligned.config)) is not None:
                    rebuild_structure(model, structure)
                    model.config.quantization_config = structure
                model.load_state_dict(aligned.state_dict())
                take_bases(model.config, aligned.config)
            return sensitivity
        sensitivity = trainer.estimate_sensitivity()
        if sensitivity.basis:
            self._save_model(trainer, self._aligned, {})
        trainer.accelerator.wait_for_everyone()  # Else a late process finds the file and leaves the others waiting.
        if trainer.is_world_process_zero():
            sensitivity.save(self._scores)
        trainer.accelerator.wait_for_everyone()
        return sensitivity

    def finish(self) -> None:
        """Removes the folder, and files that a killed run was writing."""
        for left in self.output.glob(".unfinished-*"):
            left.unlink()
        self._command.unlink()
        shutil.rmtree(self.folder)

    def _has(self, command: Sequence[str]) -> bool:
        """Whether a run of the same command has left the folder."""
        return self._command.exists() and json.loads(self._command.read_text(encoding="utf-8")) == list(command)

    def _start(self, command: Sequence[str]) -> None:
        for folder in (self.output, self.output / RECOVERY):
            if list(folder.glob("checkpoint-*")):
                raise ValueError(
                    f"'{folder}' has checkpoints of another run. Choose another --output_dir, or delete them."
                )
        self._command.unlink(missing_ok=True)  # First: without it, no run takes up what is left.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(self._command, json.dumps(list(command)))


@dataclass
class FinishedRun:
    """What the stages of a run leave, beside the trainer's pruned model.

    Args:
        dense (`PreTrainedModel`): The fine-tuned model.
        sensitivity (`Sensitivity`): Its scores.
        plan (`PruningPlan`): What was removed.
        seconds (`dict[str, float]`): Time of each stage.
        history (`dict[str, list]`): The trainer's log of fine-tuning and of recovery.
    """

    dense: PreTrainedModel
    sensitivity: Sensitivity
    plan: PruningPlan
    seconds: dict[str, float]
    history: dict[str, list[dict[str, float]]]


def run_stages(trainer: HapTrainer, stages: Stages) -> FinishedRun:
    """Fine-tunes, scores, prunes and recovers the trainer's model, and evaluates it after each change.

    With `num_train_epochs=0` the model is taken as it is.

    Args:
        trainer (`HapTrainer`): Trainer of the model to fine-tune; of the one in `stages.dense`, if
            `stages.fine_tuned`.
        stages (`Stages`): What an earlier run has finished.
    """
    seed = trainer.args.seed
    if trainer.is_world_process_zero():
        print(_outlook(trainer, stages), flush=True)
    if not stages.fine_tuned:
        seconds: dict[str, float] = {}
        history = {}
        if _fine_tunes(trainer.args):
            outlook = Outlook(trainer)
            trainer.add_callback(outlook)
            with _timed("fine-tune", seconds, seed):
                trainer.train(resume_from_checkpoint=stages.checkpoint())
            trainer.remove_callback(outlook)
            history["fine-tune"] = trainer.state.log_history
        _evaluate(trainer, "dense")
        results = {name: trainer.results[name] for name in RESULTS}
        stages.save_dense(trainer, **results, seconds=seconds, history=history)
    figures = stages.figures()
    trainer.results.update({name: figures.get(name, {}) for name in RESULTS})
    seconds, history = figures["seconds"], figures["history"]
    dense = cast(PreTrainedModel, copy.deepcopy(trainer.model))
    with _timed("score", seconds, seed):
        sensitivity = stages.scores(trainer)
    with _timed("prune", seconds, seed):
        plan = trainer.prune(trainer.plan(sensitivity))
    _evaluate(trainer, "pruned")
    with _timed("recover", seconds, seed):
        trainer.train(resume_from_checkpoint=stages.checkpoint(RECOVERY))
    history["recover"] = trainer.state.log_history
    _evaluate(trainer, "recovered")
    return FinishedRun(dense, sensitivity, plan, seconds, history)


def _fine_tunes(args: TrainingArguments) -> bool:
    """Whether the arguments ask for any step of fine-tuning."""
    return args.max_steps > 0 or args.num_train_epochs > 0


def _recovery_epochs(trainer: HapTrainer) -> float:
    """The epochs of recovery, which are those of fine-tuning by default."""
    assert trainer.hap_config is not None  # A trainer without one cannot prune.
    chosen = trainer.hap_config.recovery_epochs
    return trainer.args.num_train_epochs if chosen is None else chosen


def _evaluate(trainer: HapTrainer, phase: str) -> None:
    """Evaluates a phase's model, and keeps the intervals of its metrics where their function knows them."""
    trainer.evaluate()
    intervals = getattr(trainer.compute_metrics, "intervals", dict)
    trainer.results.setdefault("intervals", {})[phase] = intervals()


class Outlook(TrainerCallback):
    """Prints, a few steps into fine-tuning, about how long the whole run takes on this machine.

    Args:
        trainer (`HapTrainer`): The run's trainer.
    """

    def __init__(self, trainer: HapTrainer):
        self.trainer, self.start = trainer, 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Times the steps between the second and the last of those that are looked at."""
        if state.global_step == 2:
            self.start = time.perf_counter()
        if state.global_step == OUTLOOK_STEPS and self.start and state.is_world_process_zero:
            step = (time.perf_counter() - self.start) / (OUTLOOK_STEPS - 2)
            config = self.trainer.hap_config
            assert config is not None  # A trainer without one cannot prune.
            epochs = args.num_train_epochs or state.num_train_epochs  # The former is not used beside max_steps.
            recovery = TEACHER_STEPS * state.max_steps * _recovery_epochs(self.trainer) / epochs
            model = self.trainer._unwrapped_model()
            # An epoch of tuning is one of training, layer by layer.
            each = REFIT_STEPS + epochs_to_tune(config.tuning_epochs, config.refit, model)
            refit = each * min(config.refit_examples, len(cast(Sized, self.trainer.train_dataset)))
            pruning = (SCORING_STEPS * config.max_examples + refit) / self.trainer._train_batch_size
            minutes = step * (state.max_steps + recovery + pruning) / 60
            print(f"All stages take about {max(minutes, 0.5):.1f} minutes on this machine.", flush=True)


def _outlook(trainer: HapTrainer, stages: Stages) -> str:
    """What the run will do, in a few lines."""
    config, data = trainer.hap_config, trainer.train_dataset
    assert config is not None  # A trainer without one cannot prune.
    if stages.fine_tuned:
        first = "1. fine-tune: finished by an earlier run"
    elif not _fine_tunes(trainer.args):
        first = "1. take the model as it is"
    else:
        precision = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "float32"
        epochs = f"(epochs: {trainer.args.num_train_epochs:g})"
        first = f"1. fine-tune on {len(cast(Sized, data)):,} examples {epochs}, in {precision}"
    recovery = f"recover by training (epochs: {_recovery_epochs(trainer):g})"
    model = cast(PreTrainedModel, trainer.model)
    kinds = kinds_to_prune(config.components, config.method, config, model)
    refit = ", refit the rest" if config.refit else ""
    refit += ", tune layers" if epochs_to_tune(config.tuning_epochs, config.refit, model) else ""
    return "\n".join(
        [
            first,
            f"2. score {words_for(kinds)} by {config.method} on {config.max_examples:,} examples",
            f"3. remove {config.ratio:.0%} of {config.budget}{refit}",
            f"4. {recovery}, evaluate, write the model, its card and report.html",
        ]
    )


@contextmanager
def _timed(stage: str, seconds: dict[str, float], seed: int) -> Iterator[None]:
    """Adds a stage's seconds, and sets the seed first: a stage must not depend on whether those before it ran."""
    set_seed(seed)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)
