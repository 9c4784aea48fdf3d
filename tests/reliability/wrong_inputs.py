"""Wrong inputs for every public entry point, and the expected errors."""

import copy
import json
import resource
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from spoiled import (
    a_plan,
    bloom,
    deeper,
    eight_bits,
    embedded,
    emptied,
    falling_table,
    files,
    offloaded,
    prepared,
    pruned,
    sharing_config,
    table,
    tied,
    two_processes,
)
from tiny import hand_made, make_batch
from torch import nn
from trainers import Rows, make_trainer
from transformers import (
    AutoModelForSequenceClassification,
)

import hap_transformers as hap


def scores(model, **changes):
    layers, heads, neurons = 2, 4, 24
    values = {
        "heads": [torch.linspace(1, 2, heads, dtype=torch.float64) for _ in range(layers)],
        "neurons": [torch.linspace(1, 2, neurons, dtype=torch.float64) for _ in range(layers)],
    }
    return hand_made("gauss_newton_trace", **{**values, **changes})


def estimate(here, batches=None, method="gauss_newton_trace", **settings):
    hap.estimate_sensitivity(
        settings.pop("model", here.model), batches or [here.batch], method, progress=False, **settings
    )


def with_weight(here, value):
    with torch.no_grad():
        here.model.bert.encoder.layer[0].output.dense.weight[0, 0] = value
    here.weights = copy.deepcopy(here.model.state_dict())


def changed(here, **entries):
    return [{**here.batch, **entries}]


def plan(here, **settings):
    sensitivity = scores(here.model, **{k: settings.pop(k) for k in ("heads", "neurons") if k in settings})
    hap.plan_pruning(sensitivity, settings.pop("model", here.model), **settings)


def apply(here, model=None, **fields):
    removed = {kind: fields.pop(kind) for kind in ("heads", "neurons") if kind in fields}
    original = {"heads": [4, 4], "neurons": [24, 24], **fields.pop("original", {})}
    plan = {"removed": removed, "model_type": "bert", "original": original, **fields}
    hap.apply_plan(model or here.model, hap.PruningPlan(**plan))


def refit(here, batches=None, dense=None, **settings):
    hap.reconstruct(
        here.model, dense or here.dense, [here.batch] if batches is None else batches, progress=False, **settings
    )


def trainer(here, **changes):
    settings = {"hap_config": hap.HapConfig(ratio=0.5, max_examples=8), "model": here.model, **changes}
    return make_trainer(here.folder / "out", **settings)


def rows(size=8, **entries):
    dataset = Rows(size)
    dataset.rows = [{**row, **entries} for row in dataset.rows]
    return dataset


def load(here, text=None, weights=None, **config):
    """Loads a pruned checkpoint after changes to its files."""
    path = here.saved / "config.json"
    values = json.loads(path.read_text())
    for name, value in config.items():
        if name in ("heads", "neurons", "implants", "more"):
            values["quantization_config"][name] = value
        else:
            values[name] = value
    path.write_text(json.dumps(values) if text is None else text)
    if weights is not None:
        weights(here.saved / "model.safetensors")
    here.files = files(here.folder)
    AutoModelForSequenceClassification.from_pretrained(here.saved)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def pickled(path):
    torch.save(torch.load, path.with_name("pytorch_model.bin"))
    path.unlink()


def written(here, content, name="file"):
    path = here.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    here.files = files(here.folder)
    return path


def plan_file(here, content=None, **changes):
    path = here.folder / "plan.json"
    hap.PruningPlan.for_model(here.model, heads={0: [1]}).save(path)
    text = json.dumps({**json.loads(path.read_text()), **changes}) if content is None else content
    hap.apply_plan(here.model, hap.PruningPlan.load(written(here, text, "plan.json")))


def tensors_file(here, metadata):
    save_file({"heads.0": torch.ones(2)}, here.folder / "file", metadata=metadata)
    here.files = files(here.folder)
    return here.folder / "file"


def disk_full(here, action):
    """Runs an action while no file may grow beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def below_a_file(here):
    """A folder that nobody can make, not even root."""
    return written(here, "", "in_the_way") / "folder"


class Empty(Rows):
    def __init__(self):
        self.rows = []


def with_rows(here, dataset):
    hap_trainer = trainer(here)
    hap_trainer.train_dataset = dataset
    return hap_trainer


@dataclass
class Wrong:
    """A wrong call, and the expected error."""

    name: str
    action: object
    message: str
    error: type = ValueError


V, F = ValueError, FileNotFoundError
TABLE = [
    # estimate_sensitivity: settings
    Wrong("method", lambda h: estimate(h, method="hessian"), "Unknown sensitivity method 'hessian'; choose one of"),
    Wrong("batches are None", lambda h: hap.estimate_sensitivity(h.model, None), "`batches` is a NoneType; give"),
    Wrong("components a string", lambda h: estimate(h, components="heads"), "`components` must name some of"),
    Wrong("components unknown", lambda h: estimate(h, components=["columns"]), "`components` must name some of"),
    Wrong("components none", lambda h: estimate(h, components=[]), "`components` must name some of"),
    Wrong("probes", lambda h: estimate(h, num_probes=0), "`num_probes` must be a whole number, 1 or more, got 0"),
    Wrong("tolerance", lambda h: estimate(h, tolerance=1.0), "`tolerance` .* must be in"),
    Wrong("examples", lambda h: estimate(h, max_examples=0), "`max_examples` must be a whole number, 1 or more"),
    Wrong("precision", lambda h: estimate(h, precision="fp8"), "fp8"),
    # estimate_sensitivity: batches
    Wrong("no batches", lambda h: estimate(h, batches=iter(())), "No examples to score: `batches` is empty"),
    Wrong("a tensor for a batch", lambda h: estimate(h, [torch.ones(2, 3)]), "Batch 0 is a Tensor; give dictionaries"),
    Wrong("no tensors", lambda h: estimate(h, [{"labels": None}]), "Batch 0 has no tensors"),
    Wrong(
        "no labels",
        lambda h: estimate(h, [{"input_ids": h.batch["input_ids"]}], method="gradient"),
        "Batch 0 has no labels .*'gradient' needs them",
    ),
    Wrong("label too high", lambda h: estimate(h, changed(h, labels=torch.tensor([0, 1, 7]))), "batch 0.*Target 7"),
    Wrong("label negative", lambda h: estimate(h, changed(h, labels=torch.tensor([0, 1, -3]))), "batch 0.*Target -3"),
    Wrong("labels too few", lambda h: estimate(h, changed(h, labels=torch.tensor([0, 1]))), "Batch 0"),
    Wrong(
        "token unknown", lambda h: estimate(h, changed(h, input_ids=h.batch["input_ids"] + 99)), "batch 0.*index out"
    ),
    Wrong(
        "token negative", lambda h: estimate(h, changed(h, input_ids=h.batch["input_ids"] - 99)), "batch 0.*index out"
    ),
    Wrong("tokens floats", lambda h: estimate(h, changed(h, input_ids=h.batch["input_ids"].float())), "batch 0"),
    Wrong("too long", lambda h: estimate(h, [make_batch(3, 40)]), "batch 0.*40"),
    Wrong(
        "mask too short", lambda h: estimate(h, changed(h, attention_mask=torch.tensor([[1, 1, 1, 0]] * 3))), "batch 0"
    ),
    Wrong("embeddings NaN", lambda h: estimate(h, [embedded(h, float("nan"))]), "loss of batch 0 is nan; .*NaN"),
    Wrong("embeddings infinite", lambda h: estimate(h, [embedded(h, float("inf"))]), "loss of batch 0 is nan"),
    Wrong(
        "prepared loader", lambda h: estimate(h, prepared(h), accelerator=two_processes()), "`batches` is a prepared"
    ),
    # estimate_sensitivity: model and loss
    Wrong("weight NaN", lambda h: (with_weight(h, float("nan")), estimate(h)), "loss of batch 0 is nan; .*weights"),
    Wrong("weight infinite", lambda h: (with_weight(h, float("inf")), estimate(h)), "loss of batch 0 is nan"),
    Wrong("architecture", lambda h: estimate(h, model=bloom()), "'bloom'"),
    Wrong(
        "no model",
        lambda h: estimate(h, model=nn.Identity()),
        "Identity is no model of Transformers.*give a model",
        TypeError,
    ),
    Wrong("nothing left", lambda h: estimate(h, model=emptied(), components=["heads"]), "has no heads left to score"),
    Wrong("loss none", lambda h: estimate(h, loss_fn=lambda m, b: None), "loss_fn.*NoneType"),
    Wrong("loss a vector", lambda h: estimate(h, loss_fn=lambda m, b: m(**b).logits[:, 0]), "one finite number"),
    Wrong(
        "loss detached",
        lambda h: estimate(h, loss_fn=lambda m, b: m(**b).loss.detach()),
        "does not depend on the model",
    ),
    Wrong(
        "loss of two calls", lambda h: estimate(h, loss_fn=lambda m, b: m(**b).loss + m(**b).loss), "more than once"
    ),
    Wrong("state file of text", lambda h: estimate(h, state_file=written(h, "x")), "not a state file .*Name another"),
    Wrong(
        "state file elsewhere",
        lambda h: estimate(h, state_file=h.folder / "no" / "file"),
        "no folder .*make it first",
        F,
    ),
    # plan_pruning
    Wrong("ratio 1", lambda h: plan(h, ratio=1.0), "`ratio`"),
    Wrong("ratio NaN", lambda h: plan(h, ratio=float("nan")), "`ratio`"),
    Wrong("ratio negative", lambda h: plan(h, ratio=-0.1), "`ratio`"),
    Wrong(
        "ratio out of reach",
        lambda h: plan(h, ratio=0.9, min_heads=4),
        "cannot be met: .*Lower the ratio, the floors or neuron_multiple",
    ),
    Wrong("budget", lambda h: plan(h, budget="memory"), "Unknown budget 'memory'; choose one of"),
    Wrong("floor of heads", lambda h: plan(h, min_heads=-1), "`min_heads`"),
    Wrong("floor of neurons", lambda h: plan(h, min_neurons=2.0), "`min_neurons`"),
    Wrong("multiple", lambda h: plan(h, neuron_multiple=0), "`neuron_multiple`"),
    Wrong("implants", lambda h: plan(h, implant_ratio=1.5), "`implant_ratio`"),
    Wrong("FLOPs of what", lambda h: plan(h, budget="flops"), "pass a batch as `inputs`"),
    Wrong("seconds of what", lambda h: plan(h, budget="latency"), "latency_table"),
    Wrong("table of another", lambda h: plan(h, budget="latency", latency_table=table()), "is of a 'gpt2'"),
    Wrong("scores NaN", lambda h: plan(h, heads=[torch.full((4,), torch.nan)] * 2), "finite"),
    Wrong("scores too few", lambda h: plan(h, heads=[torch.ones(3)] * 2), "3"),
    Wrong(
        "layers too few",
        lambda h: plan(h, heads=[torch.ones(4)]),
        r"scores for \[4\] heads per layer, the model has \[4, 4\]",
    ),
    Wrong("scores missing", lambda h: plan(h, neurons=None), "neurons"),
    # apply_plan, prune_heads
    Wrong("layer", lambda h: apply(h, heads={2: [0]}), "heads of layer 2: the model has layers 0 to 1. Nothing"),
    Wrong("head", lambda h: apply(h, heads={0: [4]}), r"heads \[4\] of layer 0: they are numbered 0 to 3"),
    Wrong("head negative", lambda h: apply(h, heads={0: [-1]}), r"heads \[-1\] of layer 0"),
    Wrong("head twice", lambda h: apply(h, heads={0: [1, 1]}), "names a head of layer 0 twice"),
    Wrong("head a fraction", lambda h: apply(h, heads={0: [1.5]}), "whole numbers", TypeError),
    Wrong("neuron", lambda h: apply(h, neurons={1: [24]}), r"neurons \[24\] of layer 1"),
    Wrong("neuron twice", lambda h: apply(h, neurons={1: [3, 3]}), "names a neuron of layer 1 twice"),
    Wrong(
        "plan of a RoBERTa", lambda h: apply(h, model_type="roberta"), "for a 'roberta'.*Make a plan for this model"
    ),
    Wrong("plan of more layers", lambda h: apply(h, original={"heads": [4, 4, 4]}), "Make a plan for this model"),
    Wrong(
        "plan of other neurons",
        lambda h: apply(h, neurons={0: [1]}, original={"neurons": [24, 16]}),
        r"for \[24, 16\] neurons",
    ),
    Wrong("implant too large", lambda h: apply(h, neurons={0: [1]}, implants={0: 2}), "rank 2 in layer 0"),
    Wrong("implant alone", lambda h: apply(h, implants={0: 1}), "rank 1 in layer 0, where it removes 0"),
    Wrong("promise", lambda h: apply(h, heads={0: [1]}, promise={"parameters": 5}), "promises 5 parameters"),
    Wrong(
        "plan of a model pruned since",
        lambda h: apply(h, emptied(), neurons={0: [1]}, original={"neurons": [9, 9]}),
        "as it is",
    ),
    Wrong("prune_heads layer", lambda h: h.model.prune_heads({5: [0]}), "layer 5: the model has layers 0 to 1"),
    Wrong("prune_heads head", lambda h: hap.prune_heads(h.model, {0: [9]}), r"heads \[9\]"),
    Wrong("weights offloaded", lambda h: apply(h, offloaded(h), heads={0: [1]}), "are not in memory but offloaded"),
    Wrong("scored where offloaded", lambda h: estimate(h, model=offloaded(h)), "are not in memory but offloaded"),
    Wrong("trainer of offloaded weights", lambda h: trainer(h, model=offloaded(h)), "of the model .* not in memory"),
    Wrong("weights shared", lambda h: apply(h, tied(h), heads={0: [1]}), "shares a weight with .*Untie"),
    Wrong("weights of 8 bits", lambda h: apply(h, eight_bits(h), heads={0: [1]}), "Prune before quantizing"),
    Wrong("config shared", lambda h: apply(h, sharing_config(h), heads={0: [2]}), "its own copy.deepcopy.config."),
    # reconstruct
    Wrong("ridge", lambda h: refit(h, ridge=-1.0), "`ridge` must not be negative, got -1"),
    Wrong("refit on nothing", lambda h: refit(pruned(h), []), "No tokens to refit on"),
    Wrong("refit on padding", lambda h: refit(pruned(h), changed(h, attention_mask=torch.zeros(3, 7))), "No tokens"),
    Wrong("refit to another", lambda h: refit(h, dense=deeper()), "have different layers"),
    Wrong("refit to itself", lambda h: refit(h, dense=h.model), "`dense` is the pruned model itself; give a copy"),
    Wrong(
        "refit the other way round",
        lambda h: hap.reconstruct(h.dense, pruned(h).model, [h.batch], progress=False),
        "that of `dense` 3. Give the pruned model first",
    ),
    Wrong("refit on one batch", lambda h: refit(pruned(h), h.batch), "Batch 0 is a str; give dictionaries"),
    Wrong("refit on NaN", lambda h: refit(pruned(h), [embedded(h, float("nan"))]), "not finite"),
    # HapConfig
    *(
        Wrong(f"HapConfig {name}={value}", lambda h, n=name, v=value: hap.HapConfig(**{n: v}), f"{name}|'{value}'")
        for name, value in [
            *(("ratio", 1.0), ("ratio", -1), ("budget", "watts"), ("method", "magic"), ("num_probes", 0)),
            *(("max_examples", 0), ("tolerance", 2.0), ("ridge", -0.1), ("ridge", float("nan")), ("min_heads", -1)),
            *(("min_neurons", 1.5), ("neuron_multiple", 0), ("implant_ratio", -0.5), ("implant_init", "random")),
            *(("recovery_epochs", 0), ("recovery_learning_rate", -1e-5), ("sequence_length", 0)),
            *(("distillation", 1.1), ("distillation_temperature", 0), ("distillation_hidden", -1.0)),
        ]
    ),
    # HapTrainer
    Wrong("trainer without config", lambda h: trainer(h, hap_config=None).prune(), "pass hap_config=HapConfig"),
    Wrong("trainer without data", lambda h: with_rows(h, None).prune(), "pass train_dataset"),
    Wrong("trainer of a Bloom", lambda h: trainer(h, model=bloom()), "'bloom'"),
    Wrong("trainer: no rows", lambda h: with_rows(h, Empty()).prune(), "the train_dataset is empty"),
    Wrong(
        "trainer: a config that is none",
        lambda h: trainer(h, hap_config={"ratio": 0.5}, watched=True),
        "is a dict",
        TypeError,
    ),
    Wrong(
        "trainer: rows without labels for gradients",
        lambda h: trainer(h, rows=Rows(8, labels=False), hap_config=hap.HapConfig(method="gradient")).prune(),
        "Batch 0 has no labels.*method='kronecker'",
    ),
    Wrong(
        "trainer: labels out of range",
        lambda h: trainer(h, rows=rows(labels=torch.tensor(9))).prune(),
        "batch 0.*Target 9",
    ),
    Wrong(
        "trainer: a foreign plan",
        lambda h: trainer(h).prune(hap.PruningPlan({"heads": {0: [7]}}, "bert", {"heads": [8, 8]})),
        "Make a plan",
    ),
    Wrong("trainer: no checkpoint", lambda h: trainer(h).train(resume_from_checkpoint=True), "No whole checkpoint"),
    # Files
    Wrong("plan file missing", lambda h: hap.PruningPlan.load(h.folder / "no.json"), "no.json", F),
    Wrong("plan cut short", lambda h: plan_file(h, content='{"heads": {"0":'), "is not a pruning plan"),
    Wrong("plan a list", lambda h: plan_file(h, content="[1, 2]"), "is not a pruning plan"),
    Wrong("plan with more", lambda h: plan_file(h, code="import os"), "is not a pruning plan"),
    Wrong("plan of text", lambda h: plan_file(h, removed={"heads": {"0": ["a"]}}), "is not a pruning plan"),
    Wrong(
        "plan of texts for counts",
        lambda h: plan_file(h, original={"heads": "44"}),
        "Make a plan|is not a pruning plan",
    ),
    Wrong("plan of binary", lambda h: plan_file(h, content=b"\xff\xfe\x00"), r"plan: ValueError\('it is no text'\)$"),
    Wrong("plan edited", lambda h: plan_file(h, removed={"heads": {"0": [1, 99]}}), r"heads \[99\]"),
    Wrong("scores missing file", lambda h: hap.Sensitivity.load(h.folder / "no"), "No sensitivity file at", F),
    Wrong("scores of text", lambda h: hap.Sensitivity.load(written(h, "x" * 99)), "is not a file written by"),
    Wrong("scores bare", lambda h: hap.Sensitivity.load(tensors_file(h, None)), "is not a file written by"),
    Wrong(
        "scores of a list", lambda h: hap.Sensitivity.load(tensors_file(h, {"sensitivity": "[1]"})), "is not a file"
    ),
    Wrong("table of text", lambda h: hap.LatencyTable.load(written(h, "x")), "is not a latency table"),
    Wrong("table falling", lambda h: hap.LatencyTable.load(written(h, falling_table())), "must rise together"),
    Wrong("plan to a full disk", lambda h: disk_full(h, lambda: a_plan(h).save(h.folder / "p")), "too large", OSError),
    Wrong(
        "scores to a full disk", lambda h: disk_full(h, lambda: scores(h).save(h.folder / "s")), "too large", Exception
    ),
    Wrong(
        "trainer: model to a full disk",
        lambda h: disk_full(h, lambda: trainer(h).save_model()),
        "too large",
        Exception,
    ),
    Wrong("plan nowhere", lambda h: a_plan(h).save(below_a_file(h) / "p"), "Not a directory", OSError),
    Wrong("trainer: model nowhere", lambda h: trainer(h).save_model(str(below_a_file(h))), "Not a directory", OSError),
    Wrong("remote code of nothing", lambda h: hap.export_remote_code(h.folder), "has no config.json", F),
    Wrong("remote code of a dense model", lambda h: hap.export_remote_code(h.dense_saved), "needs no remote code"),
    # from_pretrained
    Wrong("more heads", lambda h: load(h, heads={"0": 9}), "gives layer 0 9 heads"),
    Wrong("heads negative", lambda h: load(h, heads={"0": -1}), "gives layer 0 -1 heads"),
    Wrong("heads true", lambda h: load(h, heads={"0": True}), "gives layer 0 True heads"),
    Wrong("heads a text", lambda h: load(h, heads={"0": "3"}), "gives layer 0 '3' heads"),
    Wrong("heads a list", lambda h: load(h, heads=[3, 4]), "gives numbers of heads by layer as"),
    Wrong("layer of heads", lambda h: load(h, heads={"9": 1}), "has layers 0 to 1"),
    Wrong("heads contradict", lambda h: load(h, pruned_heads={"0": [1, 2]}), "pruned_heads"),
    Wrong("neurons of other weights", lambda h: load(h, neurons={"1": 8}), "do not belong together"),
    Wrong("neurons huge", lambda h: load(h, neurons={"1": 10**12}), "gives layer 1 1000000000000 neurons"),
    Wrong("implant huge", lambda h: load(h, implants={"1": 10**9}), "an implant of rank"),
    Wrong("implants a text", lambda h: load(h, implants="1"), "gives implants by layer as '1'"),
    Wrong("structure of tomorrow", lambda h: load(h, more={}), r"has \['more'\].*Upgrade the package"),
    Wrong("config of text", lambda h: load(h, text="{"), "config.json", Exception),
    Wrong("weights cut short", lambda h: load(h, weights=truncate), "(?i)header|incomplete|metadata", Exception),
    Wrong("weights pickled", lambda h: load(h, weights=pickled), "safetensors only"),
]
