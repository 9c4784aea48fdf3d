"""Training resumes from the right checkpoint, dense or pruned, or reports why it cannot."""

import pytest
import torch
from trainers import Rows, make_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from hap_transformers import HapConfig, PruningPlan
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.training.resuming import last_whole_checkpoint


CONFIG = {"ratio": 0.5, "max_examples": 8, "recovery_epochs": 2, "recovery_learning_rate": 5e-4}
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


class Interrupted(Exception):
    pass


class StopAt(TrainerCallback):
    """Interrupts a training at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def trainer_of(folder, callbacks=None, **more):
    torch.manual_seed(0)
    return make_trainer(folder, callbacks=callbacks, hap_config=HapConfig(**CONFIG), **{**SAVING, **more})


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_resumes_before_and_after_pruning(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    dense = weights(whole)
    whole.prune()
    torch.manual_seed(1)
    whole.train()
    assert (whole.state.global_step, whole.args.output_dir) == (12, str(tmp_path / "whole"))

    with pytest.raises(Interrupted):
        trainer_of(tmp_path / "cut", [StopAt(5)]).train()
    again = trainer_of(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert same(dense, weights(again))
    again.prune()
    assert again.pruning_plan == whole.pruning_plan
    again.add_callback(StopAt(7))
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        again.train()

    last = trainer_of(tmp_path / "cut")
    last.train(resume_from_checkpoint=True)  # It was finished already.
    last.prune()
    torch.manual_seed(1)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 12 and same(weights(whole), weights(last))
    # Recovery left the dense checkpoints alone.
    assert last_whole_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-6")
    assert (
        len(list((tmp_path / "cut" / "_recovery").glob("checkpoint-*"))) == 2
    )  # The limit holds for the recovery, too.


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
@pytest.mark.slow
def test_a_later_process_prunes_alike(tmp_path, precision):
    """Accelerate wraps a model that trains in mixed precision. A later process has no such wrapper when it prunes."""
    first = trainer_of(tmp_path / "first", **precision)
    first.train()
    first.save_model(str(tmp_path / "dense"))
    later = trainer_of(tmp_path / "later", model=type(first.model).from_pretrained(tmp_path / "dense"), **precision)
    for trainer in (first, later):
        trainer.prune(PruningPlan.for_model(trainer.model, heads={0: [1, 2]}, neurons={0: range(4), 1: range(12)}))
    assert same(weights(first), weights(later))


def test_checkpoints_of_another_structure_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.prune()
    before = weights(trainer)
    with pytest.raises(ValueError, match="checkpoint-6' is of a dense model, the BertFor.* in training is pruned"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(before, weights(trainer))
    trainer.train()
    recovered = tmp_path / "_recovery" / "checkpoint-12"
    with pytest.raises(ValueError, match="is of a pruned model, the BertFor.* in training is dense"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(recovered))
    other = trainer_of(tmp_path)
    other.prune(PruningPlan.for_model(other.model, heads={0: [1]}))
    with pytest.raises(ValueError, match="in training is pruned, with another structure"):
        other.train(resume_from_checkpoint=str(recovered))
    with pytest.raises(ValueError, match="No whole checkpoint"):
        other.train(resume_from_checkpoint=True)
    other.state.best_model_checkpoint = str(recovered)
    with pytest.raises(ValueError, match="in training is pruned, with another structure"):
        other._load_best_model()


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="No whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    for text in ("", '{"global_step": '):
        (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(text)
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-9-old").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_batches_of_like_length_come_in_the_same_order(tmp_path):
    """Training that is interrupted in the second epoch resumes with the same batches."""
    grouped = {"group_by_length": True} if TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}
    settings = {**grouped, "num_train_epochs": 3, "seed": 3}
    rows = Rows(24)
    whole = trainer_of(tmp_path / "whole", rows=rows, **settings)
    whole.train()
    with pytest.raises(Interrupted):
        trainer_of(tmp_path / "cut", [StopAt(9)], rows=rows, **settings).train()
    again = trainer_of(tmp_path / "cut", rows=rows, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 18 and same(weights(whole), weights(again))


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_model_of_each_phase(tmp_path, greater):
    """The dense and the pruned phase each load their best checkpoint and stop early."""
    # The metric of each evaluation: the best is in the middle of each phase.
    told = iter([1.0, 3.0, 2.0, 1.0, 9.0, 1.0, 3.0, 2.0, 1.0, 9.0])
    trainer = trainer_of(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=2)],
        num_train_epochs=2,
        load_best_model_at_end=True,
        metric_for_best_model="told",
        greater_is_better=greater,
        **{"eval_strategy": "steps", "eval_steps": 2},
    )
    trainer.compute_metrics = lambda prediction: {"told": next(told) * (1 if greater else -1)}
    for folder in (tmp_path, tmp_path / "_recovery"):
        trainer.train()
        assert trainer.state.global_step == 8 and trainer.state.best_global_step == 4
        best = trainer.state.best_model_checkpoint
        assert best == str(folder / "checkpoint-4")
        kept = type(trainer.model).from_pretrained(best).state_dict()
        assert same(weights(trainer), kept)
        # The card shows the metrics of the loaded weights, not of the last evaluation.
        phase = "dense" if folder == tmp_path else "recovered"
        assert trainer.results["metrics"][phase]["told"] == (3.0 if greater else -3.0)
        if folder == tmp_path:
            trainer.compute_metrics, metrics = None, trainer.compute_metrics
            trainer.prune()
            trainer.compute_metrics = metrics
            next(told)
