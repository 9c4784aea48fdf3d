"""What tests of trainers of several packages share."""

import torch
from torch.nn import functional as F

from hap_transformers import HapConfig


CONFIG = HapConfig(ratio=0.5, max_examples=16, refit_examples=16, min_neurons=0.0, recovery_check="none")
WORDS = ["good film", "bad plot", "a good plot", "b bad film here", "c d e film", "plot plot good"]
COMMON = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
}


def texts(count=24):
    """Short texts of words that the tokenizer of `save_model` knows."""
    return [f"{WORDS[i % len(WORDS)]} {'abcdefgh'[i % 8]}" for i in range(count)]


def without_dropout(model):
    """The model, whose dropout is switched off for good."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@torch.no_grad()
def agreement(model, dense, batch):
    """Minus the divergence of the next tokens' distributions from the dense model's."""
    logs = [one.eval()(**batch).logits.log_softmax(-1) for one in (model, dense)]
    return -F.kl_div(*logs, log_target=True, reduction="batchmean").item()
