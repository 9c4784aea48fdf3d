"""Recovery without labels: a pruned language model is trained to give the dense model's distribution of tokens."""

import tempfile

import torch
from datasets import Dataset
from transformers import DefaultDataCollator, PreTrainedModel, PrinterCallback

from glue_scripts.compare_glue.quiet_training import quiet_arguments
from hap_transformers import HapConfig, HapTrainer


BATCH_SIZE = 4


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    learning_rate: float,
    bf16: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Trains a pruned model for one epoch.

    Args:
        model (`PreTrainedModel`): The pruned model.
        dense (`PreTrainedModel`): The dense model, which it follows.
        windows (`torch.Tensor`): Token ids, shape `(windows, length)`.
        learning_rate (`float`): The highest one. It rises over the first tenth, and falls to 0.
        bf16 (`bool`, *optional*, defaults to `False`): Whether products are in bf16; weights stay as they are.
        seed (`int`, *optional*, defaults to 0): Seed of the order of windows.
    """
    rows = Dataset.from_dict({"input_ids": windows.tolist(), "labels": windows.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        args = quiet_arguments(
            folder,
            learning_rate=learning_rate,
            num_train_epochs=1,
            warmup_steps=len(rows) // (10 * BATCH_SIZE),
            per_device_train_batch_size=BATCH_SIZE,
            seed=seed,
            bf16=bf16,
            use_cpu=True,
        )
        trainer = HapTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=DefaultDataCollator(),
            teacher=dense,
            hap_config=HapConfig(distillation=1.0, recovery_check="none"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()
