"""Runs the cells that are missing."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.embeddings import timed
from benchmarks.embeddings_cells import append_cell
from glue_scripts.compare_glue.cells import Cell, read_cells
from hap_transformers import apply_plan, reconstruct
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import (
    bf16_is_fast,
    compare_latency,
    count_encoder_parameters,
    count_flops,
    count_parameters,
    evaluating,
)

from .cells import RATIOS, SEEDS, Key, keys_of
from .data import Batches, Cifar
from .methods import METHODS, Score
from .networks import NETWORKS
from .recovery import Recovery, recover


RESULTS = Path(__file__).parents[2] / "benchmarks" / "cifar.jsonl"
TEST_SEED = 0
# Batch sizes, and timed passes of each network.
LATENCY_BATCHES, REPEATS = (8, 128), 5


@dataclass
class Arguments:
    """What to run, and on which images."""

    data_dir: str = field(metadata={"help": "Folder with train.parquet and test.parquet of CIFAR-10."})
    dense_dir: str = field(metadata={"help": "Folder with the weights of the dense networks."})
    output: str = field(default=str(RESULTS), metadata={"help": "File of the cells."})
    networks: list[str] = field(default_factory=lambda: list(NETWORKS))
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    ratios: list[float] = field(
        default_factory=lambda: list(RATIOS), metadata={"help": "Shares of the parameters of the blocks to remove."}
    )
    seeds: list[int] = field(default_factory=lambda: list(SEEDS), metadata={"help": "Of the training images drawn."})
    score_images: int = field(default=1024, metadata={"help": "Training images to score on."})
    refit_images: int = field(default=1024, metadata={"help": "Training images to refit on, from the same draw."})
    probes: int = field(default=300, metadata={"help": "Probes of the Hessian in HAP's and EHAP's recipe."})
    probe_images: int = field(default=32, metadata={"help": "Training images that each of these probes runs on."})
    test_images: int = field(default=4000, metadata={"help": "Test images, the same for all cells."})
    recovery_epochs: float = field(default=0.0, metadata={"help": "Epochs of training after pruning."})
    recovery_learning_rate: float = field(
        default=Recovery.learning_rate, metadata={"help": "The highest learning rate of that training."}
    )


class Bench:
    """One dense network, its scores and its cells.

    Args:
        name (`str`): One of `NETWORKS`.
        data (`Cifar`): The images.
        args (`Arguments`): The command's.
    """

    def __init__(self, name: str, data: Cifar, args: Arguments):
        self.name, self.data, self.args, self.size = name, data, args, NETWORKS[name].size
        self.dense = NETWORKS[name].load(Path(args.dense_dir)).eval()
        self.dense.to("cuda" if torch.cuda.is_available() else "cpu")
        self.test = data.batches("test", args.test_images, TEST_SEED, self.size)
        self.dense_logits = self.logits(self.dense)
        self.known: dict[tuple[Score, int], tuple[Any, float]] = {}

    def cell(self, key: Key) -> Cell:
        """Runs a cell, and returns it as it is written to the file."""
        method, seconds, model = METHODS[key.method], {}, copy.deepcopy(self.dense)
        implants: tuple[int, ...] = ()
        cell: Cell = {**key._asdict(), "dense": self.quality(self.dense)}
        if method.plan is not None:
            scored, seconds["score"] = self.scores(method.score, key.seed)
            batches = self.images(self.args.score_images, key.seed)
            plan, seconds["plan"] = timed(lambda: method.plan(self.dense, scored, batches, key.ratio))
            apply_plan(model, plan)
            implants = tuple(plan.implants)
            cell["pruned"] = self.quality(model)
        if method.refit:
            batches = self.images(key.refit_images, key.seed)
            how = {"init_implants": implants, "progress": False}
            _, seconds["refit"] = timed(lambda: reconstruct(model, self.dense, batches, **how))
            cell["refitted"] = self.quality(model)
        if key.recovery_epochs:
            settings = Recovery(learning_rate=self.args.recovery_learning_rate)
            given = (model, self.dense, self.data, self.size, key.recovery_epochs, key.seed, settings)
            _, seconds["recover"] = timed(lambda: recover(*given))
            cell |= {"recovered": self.quality(model), "recovery_learning_rate": settings.learning_rate}
        return {
            **cell,
            **self.costs(model),
            "latency": self.latency(model) if method.plan is not None else {},
            "channels": [group.num_components for group in find_groups(model)],
            "implants": [group.implant_rank for group in find_groups(model)],
            "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
            "images": {
                name: vars(self.args)[f"{name}_images"] for name in ("score", "test", *["probe"] * method.score.probes)
            },
            **({"probes": self.args.probes} if method.score.probes else {}),
            "bf16": bf16_is_fast(),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }

    def images(self, count: int, seed: int) -> Batches:
        """Draws training images, on the network's device."""
        return send_to_device(self.data.batches("train", count, seed, self.size), self.dense.device)

    def scores(self, score: Score, seed: int) -> tuple[Any, float]:
        """The dense network's scores and the seconds that they took; they are kept."""
        if (score, seed) not in self.known:
            batches = self.images(self.args.probe_images if score.probes else self.args.score_images, seed)
            self.known[score, seed] = timed(lambda: score(self.dense, batches, self.args.probes, seed))
        return self.known[score, seed]

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Those of the test images, shape `(images, classes)`, in bf16 where the processor has it."""
        with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16_is_fast()):
            found = [model(batch["pixel_values"].to(model.device)).logits for batch in self.test]
        return torch.cat(found).float().cpu()

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        """The share of test images that are classified rightly, and the mean divergence from the dense network."""
        logits = self.dense_logits if model is self.dense else self.logits(model)
        right = torch.cat([batch["labels"] for batch in self.test]) == logits.argmax(1)
        pair = (values.double().log_softmax(1) for values in (logits, self.dense_logits))
        kl = F.kl_div(*pair, log_target=True, reduction="batchmean")
        return {"accuracy": round(right.double().mean().item(), 5), "kl": round(kl.item(), 5)}

    def costs(self, model: PreTrainedModel) -> dict[str, int]:
        """Parameters of the network and of its blocks, and FLOPs for one image; also those of the dense network."""
        image = {"pixel_values": self.test[0]["pixel_values"][:1].to(model.device)}
        found = {}
        for prefix, network in (("", model), ("dense_", self.dense)):
            found[f"{prefix}parameters"] = count_parameters(network)
            found[f"{prefix}block_parameters"] = count_encoder_parameters(network)
            found[f"{prefix}flops"] = count_flops(network, image)
        return found

    def latency(self, model: PreTrainedModel) -> dict[str, float]:
        """The time of a forward pass in float32 over that of the dense network, by batch size."""
        found = {}
        for size in LATENCY_BATCHES:
            inputs = {"pixel_values": self.test[0]["pixel_values"][:size].to(model.device)}
            seconds = compare_latency({"dense": self.dense, "pruned": model}, inputs, REPEATS)
            found[str(size)] = round(seconds["pruned"] / seconds["dense"], 3)
        return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the missing cells in their order, and writes each as soon as it is done."""
    parser = HfArgumentParser(Arguments, prog="python -m vision_scripts.compare_cifar", description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(arguments)
    keys = keys_of(args.networks, args.methods, args.ratios, args.seeds, args.refit_images, args.recovery_epochs)
    output = Path(args.output)
    known = read_cells(output, Key)
    missing = [key for key in keys if key not in known]
    data = Cifar.load(args.data_dir) if missing else None
    bench = None
    for key in missing:
        if bench is None or bench.name != key.network:
            bench = Bench(key.network, data, args)
        append_cell(output, bench.cell(key))
        print(*key, flush=True)
