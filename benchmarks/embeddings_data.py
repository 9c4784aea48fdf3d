"""The sentence encoders, the sentences that they are pruned on, and those that their quality is measured on."""

from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glue_scripts.compare_glue.base_models import BASE_MODELS
from hap_transformers import SelfLoss


Batches = list[dict[str, torch.Tensor]]

# Calibration texts, by the training splits that they come from.
CALIBRATION = {"STS-B": ("stsb",), "SST-2 and CoLA": ("sst2", "cola")}
COLUMNS = {
    "stsb": ("sentence1", "sentence2"),
    "mrpc": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "cola": ("sentence",),
}
# Nearly all sentences are shorter.
MAX_LENGTH = 128
# STS-B rates pairs from 0 to 5; from 4 on they differ in details only.
SAME_MEANING = 4.0


@dataclass
class Encoder:
    """A sentence encoder: a model whose tokens are averaged, the average divided by its norm.

    Args:
        name (`str`): What the results call it.
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        bf16 (`bool`): Whether it runs in bf16.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bf16: bool = False

    @classmethod
    def load(cls, name: str, cache: Path, bf16: bool = False) -> "Encoder":
        """Loads one of `BASE_MODELS`."""
        folder = BASE_MODELS[name].folder(cache)
        return cls(name, AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), bf16)

    def batches(self, sentences: list[str], size: int = 32) -> Batches:
        """Tokenizes sentences and sorts them by length; each batch is padded to its longest one."""
        encoded = self.tokenizer(sentences, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = self._by_length(encoded)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return [
            dict(self.tokenizer.pad({"input_ids": [encoded[i] for i in part]}, return_tensors="pt")) for part in parts
        ]

    @torch.no_grad()
    def embed(self, model: PreTrainedModel, sentences: list[str]) -> torch.Tensor:
        """The embeddings of sentences by this encoder or a pruned one, shape `(sentences, features)`."""
        encoded = self.tokenizer(sentences, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        rows = [SelfLoss().embedding(model, self.run(model, batch), batch) for batch in self.batches(sentences, 64)]
        return torch.cat(rows).float()[np.argsort(self._by_length(encoded))]

    def run(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]):
        """Runs a model on a batch in the encoder's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return model(**batch)

    def _by_length(self, encoded: list[list[int]]) -> np.ndarray:
        return np.argsort([len(ids) for ids in encoded], kind="stable")


def sentences_of(data_dir: str, task: str, split: str) -> list[str]:
    """The different sentences of a split, in their order."""
    rows = pd.read_parquet(Path(data_dir) / task / f"{split}.parquet")
    return list(dict.fromkeys(chain.from_iterable(rows[column] for column in COLUMNS[task])))


def calibration_sentences(data_dir: str, text: str, seed: int, count: int) -> list[str]:
    """Draws training sentences, of several tasks in turn. A smaller draw is the start of a larger one."""
    pools = [sentences_of(data_dir, task, "train") for task in CALIBRATION[text]]
    orders = [np.random.default_rng(seed).permutation(len(pool)) for pool in pools]
    drawn = zip_longest(*([pool[i] for i in order[:count]] for pool, order in zip(pools, orders, strict=True)))
    return [sentence for sentence in dict.fromkeys(chain.from_iterable(drawn)) if sentence is not None][:count]


@dataclass
class HeldOut:
    """What quality is measured on. Positions are those of `sentences`.

    Args:
        sentences (`list[str]`): All sentences, each once.
        rated (`torch.Tensor`): The pairs of STS-B's validation split, shape `(pairs, 2)`.
        ratings (`torch.Tensor`): How alike people found them, shape `(pairs,)`.
        unseen (`dict[str, torch.Tensor]`): By task, the sentences that its training split does not have.
        partners (`dict[str, torch.Tensor]`): By task, pairs of sentences that mean the same, shape `(pairs, 2)`.
        candidates (`dict[str, torch.Tensor]`): By task, the second sentences of all pairs, each once.
    """

    sentences: list[str]
    rated: torch.Tensor
    ratings: torch.Tensor
    unseen: dict[str, torch.Tensor]
    partners: dict[str, torch.Tensor]
    candidates: dict[str, torch.Tensor]

    @classmethod
    def load(cls, data_dir: str) -> "HeldOut":
        """Reads the validation splits of STS-B, SST-2 and CoLA, and MRPC's validation and test splits."""
        stsb = pd.read_parquet(Path(data_dir) / "stsb" / "validation.parquet")
        splits = [pd.read_parquet(Path(data_dir) / "mrpc" / f"{split}.parquet") for split in ("validation", "test")]
        of_pairs = {"mrpc": pd.concat(splits), "stsb": stsb}
        least = {"mrpc": 1, "stsb": SAME_MEANING}
        unseen = {task: sentences_of(data_dir, task, "validation") for task in ("stsb", "sst2", "cola")}
        for task, found in unseen.items():
            seen = set(sentences_of(data_dir, task, "train"))
            unseen[task] = [sentence for sentence in found if sentence not in seen]
        columns = [frame[column] for frame in of_pairs.values() for column in COLUMNS["stsb"]]
        sentences = list(dict.fromkeys(chain(*columns, *unseen.values())))
        places = {sentence: place for place, sentence in enumerate(sentences)}

        def pairs(frame: pd.DataFrame) -> torch.Tensor:
            return torch.tensor([[places[s] for s in frame[column]] for column in COLUMNS["stsb"]]).T

        return cls(
            sentences,
            rated=pairs(stsb),
            ratings=torch.tensor(stsb["label"].to_numpy()),
            unseen={task: torch.tensor([places[s] for s in found]) for task, found in unseen.items()},
            partners={task: pairs(frame[frame["label"] >= least[task]]) for task, frame in of_pairs.items()},
            candidates={task: pairs(frame)[:, 1].unique() for task, frame in of_pairs.items()},
        )
