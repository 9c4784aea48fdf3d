"""`HapTrainerMixin` in front of other trainers; those of TRL and Sentence Transformers have files of their own."""

import copy
import dataclasses

import pytest
import torch
from any_trainers import COMMON, CONFIG, agreement, without_dropout
from trainers import make_trainer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from zoo import ZOO

from hap_transformers import HapTrainerMixin


class PrunedSeq2Seq(HapTrainerMixin, Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("labels", [True, False])
def test_seq2seq_trainer(tmp_path, labels):
    """Prediction by generating works before and after pruning; without labels BART reads its input as output, too."""
    model = without_dropout(dataclasses.replace(ZOO["bart"], task="ForConditionalGeneration").model(torch.float32))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(24):
        tokens = torch.randint(3, 40, (7,), generator=generator)
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.flip(0)})
    if not labels:
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=6, **{**COMMON, "num_train_epochs": 3}
    )
    config = dataclasses.replace(
        CONFIG, distillation=0.9 if labels else 1.0, refit=False, recovery_epochs=8, ratio=0.8
    )
    dense = copy.deepcopy(model)
    trainer = PrunedSeq2Seq(model, args, train_dataset=rows, eval_dataset=rows[:8], hap_config=config)
    if labels:
        trainer.train()
        dense = copy.deepcopy(model)
    assert trainer.predict(rows[:8], max_length=5).predictions.shape[0] == 8
    trainer.prune()
    metrics = trainer.evaluate(max_length=5, num_beams=2)
    assert ("eval_loss" in metrics) is labels
    batch = {k: torch.stack([row[k] for row in rows[:8]]) for k in rows[0]}
    before = agreement(model, dense, batch)
    trainer.train()
    assert trainer._has_distilled and agreement(model, dense, batch) > before
    assert trainer.predict(rows[:8]).predictions.shape[0] == 8
    trainer.save_model()
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(**batch).logits, model.eval()(**batch).logits)


def test_the_mixin_in_the_wrong_place():
    with pytest.raises(TypeError, match=r"first: class Wrong\(HapTrainerMixin, Seq2SeqTrainer\)"):
        type("Wrong", (Seq2SeqTrainer, HapTrainerMixin), {})


def test_a_trainer_of_another_package_follows_trainer(tmp_path):
    class Theirs(Trainer):
        pass

    class Mixed(HapTrainerMixin, Theirs):
        pass

    trainer = make_trainer(tmp_path, Mixed, hap_config=CONFIG, max_steps=1)
    trainer.prune()
    trainer.train()
    assert trainer._has_distilled
