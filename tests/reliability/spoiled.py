"""Wrong models and batches for `wrong_inputs`."""

import copy
import json
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from tiny import make_model
from torch import nn
from trainers import Rows
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForSequenceClassification,
)

import hap_transformers as hap


def embedded(here, value):
    embeddings = here.model.get_input_embeddings()(here.batch["input_ids"]).detach()
    embeddings[0, 0, 0] = value
    return {
        "inputs_embeds": embeddings,
        "attention_mask": here.batch["attention_mask"],
        "labels": here.batch["labels"],
    }


def prepared(here):
    return Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(Rows(8), batch_size=4))


def two_processes():
    return SimpleNamespace(num_processes=2, mixed_precision="no", unwrap_model=lambda model: model)


def bloom():
    with torch.random.fork_rng():
        return BloomForSequenceClassification(BloomConfig(vocab_size=40, hidden_size=8, n_layer=1, n_head=2))


def emptied():
    with torch.random.fork_rng():
        model = make_model()
    hap.prune_heads(model, {0: range(4), 1: range(4)})
    return model


def deeper():
    with torch.random.fork_rng():
        return make_model(num_hidden_layers=3)


def offloaded(here):
    return copy.deepcopy(here.model).to("meta")


def tied(here):
    model = copy.deepcopy(here.model)
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    return model


def eight_bits(here):
    model = copy.deepcopy(here.model)
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    return model


def sharing_config(here):
    with torch.random.fork_rng():
        first = BertModel(BertConfig(**{**here.model.config.to_dict(), "pruned_heads": {}}))
        second = BertModel(first.config)
    second.config = first.config
    hap.prune_heads(first, {0: [1]})
    return second


def pruned(here):
    hap.apply_plan(here.model, a_plan(here))
    here.weights = copy.deepcopy(here.model.state_dict())
    return here


def a_plan(here):
    return hap.PruningPlan.for_model(here.model, heads={0: [1]}, neurons={1: range(5)})


def table(**changes):
    counts, seconds = {"heads": [0, 4], "neurons": [0, 24]}, {"heads": [0.0, 1.0], "neurons": [0.0, 1.0]}
    values = {"model_type": "gpt2", "counts": counts, "seconds": seconds, "outside": 1.0, "batch": {}}
    return hap.LatencyTable(**{**values, **changes})


def falling_table():
    return json.dumps(vars(table(seconds={"heads": [1.0, 0.0], "neurons": [0.0, 1.0]})))


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
