"""Recovery trains without dropout, whatever form the model's dropout has."""

import pytest
import torch
from tiny import make_model
from trainers import make_trainer
from zoo import ZOO

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.training.dropout import without_dropout


DROPS = {
    "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "vit": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "t5": {"dropout_rate": 0.5},
    "distilbert": {"dropout": 0.5, "attention_dropout": 0.5, "seq_classif_dropout": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "deberta-v2": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "swin": {"drop_path_rate": 0.9},
    "beit": {"drop_path_rate": 0.9},
    "bart": {"encoder_layerdrop": 0.9},
}


@pytest.mark.parametrize("model_type", sorted(DROPS))
def test_outputs_in_training_are_those_of_evaluation(model_type):
    tiny = ZOO[model_type]
    model, batch = tiny.model(torch.float64, **DROPS[model_type]), tiny.batch()
    expected = model.eval()(**batch).logits
    model.train()
    torch.manual_seed(0)
    dropped = model(**batch).logits
    assert not torch.allclose(dropped, expected, rtol=1e-3)
    with without_dropout(model):
        torch.testing.assert_close(model(**batch).logits, expected)
        assert all(module.training for module in model.modules())
    torch.manual_seed(0)
    assert torch.equal(model(**batch).logits, dropped)  # It is back.


@pytest.mark.parametrize("wanted", [False, True])
def test_recovery_has_no_dropout_unless_wanted(tmp_path, wanted):
    seen = []

    class Noting(HapTrainer):
        def training_step(self, model, *args, **kwargs):
            seen.append({module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)})
            return super().training_step(model, *args, **kwargs)

    config = HapConfig(ratio=0.5, budget="heads", max_examples=8, recovery_dropout=wanted)
    model = make_model(dtype=torch.float32, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    trainer = make_trainer(tmp_path, Noting, model=model, hap_config=config, max_steps=1)
    trainer.train()
    trainer.prune()
    trainer.train()
    assert seen == [{0.25}, {0.25 if wanted else 0.0}]
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
