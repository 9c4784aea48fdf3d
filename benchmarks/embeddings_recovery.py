"""Recovery without labels: a pruned encoder is trained to give the dense encoder's embeddings."""

import tempfile
from itertools import chain

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PrinterCallback

from glue_scripts.compare_glue.quiet_training import quiet_arguments
from hap_transformers import HapConfig, HapTrainer
from hap_transformers.components.releases import GROUPED_BY_LENGTH
from hap_transformers.efficiency import bf16_is_fast

from .embeddings_data import MAX_LENGTH, Encoder, sentences_of


TASKS = ("stsb", "sst2", "cola", "mrpc")
SENTENCES, EPOCHS, BATCH_SIZE = 10_000, 3, 32
# Share of the training in which the learning rate rises.
WARMUP = 0.1


def training_sentences(data_dir: str, seed: int, count: int = SENTENCES) -> Dataset:
    """Draws as many training sentences of each task."""
    pools = [Dataset.from_dict({"sentence": sentences_of(data_dir, task, "train")}).shuffle(seed) for task in TASKS]
    drawn = [pool.select(range(min(len(pool), count // len(TASKS))))["sentence"] for pool in pools]
    return Dataset.from_dict({"sentence": list(dict.fromkeys(chain(*drawn)))})


def recover(
    model: PreTrainedModel, encoder: Encoder, data_dir: str, learning_rate: float, hidden: float, seed: int
) -> PreTrainedModel:
    """Trains a pruned encoder on unlabelled sentences, without dropout.

    Args:
        model (`PreTrainedModel`): The pruned model.
        encoder (`Encoder`): The dense encoder.
        data_dir (`str`): Folder of the sentences.
        learning_rate (`float`): The highest one.
        hidden (`float`): Weight of the hidden states' distance.
        seed (`int`): Seed of the draw and the order of sentences.
    """
    sentences = training_sentences(data_dir, seed)
    tokenized = sentences.map(
        lambda rows: encoder.tokenizer(rows["sentence"], truncation=True, max_length=MAX_LENGTH),
        batched=True,
        remove_columns="sentence",
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with tempfile.TemporaryDirectory() as folder:
        args = quiet_arguments(
            folder,
            learning_rate=learning_rate,
            num_train_epochs=EPOCHS,
            warmup_steps=EPOCHS * len(sentences) // (10 * BATCH_SIZE),
            per_device_train_batch_size=BATCH_SIZE,
            seed=seed,
            bf16=bf16_is_fast(),
            use_cpu=True,
            **GROUPED_BY_LENGTH,
        )
        trainer = HapTrainer(
            model=model,
            args=args,
            train_dataset=tokenized,
            data_collator=DataCollatorWithPadding(encoder.tokenizer),
            processing_class=encoder.tokenizer,
            teacher=encoder.model,
            hap_config=HapConfig(distillation=1.0, distillation_hidden=hidden),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()
