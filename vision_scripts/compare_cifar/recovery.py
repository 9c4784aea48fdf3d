"""Recovery: SGD with Nesterov momentum for one cycle, as `run_image_hap.py` trains."""

import tempfile

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from hap_transformers.components.releases import WARMUP_SHARE
from hap_transformers.efficiency import bf16_is_fast
from vision_scripts.image_trainer import ImageTrainer
from vision_scripts.run_image_hap import CIFAR_DEFAULTS

from .data import Cifar, Collator


SETTINGS = ("optim", "weight_decay", "max_grad_norm", WARMUP_SHARE, "per_device_train_batch_size")


def recover(model: PreTrainedModel, data: Cifar, size: int | None, epochs: float, seed: int) -> None:
    """Trains a network on all training images, with labels. It is left as it is after the last step.

    Args:
        model (`PreTrainedModel`): The network; changed in place.
        data (`Cifar`): The images.
        size (`int`, *optional*): Height and width that the network wants.
        epochs (`float`): Epochs.
        seed (`int`): Seed of the order of images and of their augmentation.
    """
    model.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=CIFAR_DEFAULTS["recovery_learning_rate"],
            seed=seed,
            bf16=bf16_is_fast(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **{name: CIFAR_DEFAULTS[name] for name in SETTINGS},
        )
        collator = Collator(data.normalize, size)
        trainer = ImageTrainer(model=model, args=args, train_dataset=data.train, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
