"""The program of every process that `test_distributed` launches.

torchrun --nproc_per_node 2 two_processes.py MODE FOLDER
"""

import copy
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import make_batch, make_model  # noqa: E402

from hap_transformers import (  # noqa: E402
    METHODS,
    HapConfig,
    HapTrainer,
    PruningPlan,
    align_heads,
    apply_plan,
    estimate_sensitivity,
)
from hap_transformers.refit.layer_training import train_layer  # noqa: E402


# Neither the five batches nor their examples divide evenly between two processes.
SIZES = [4, 4, 4, 4, 3]


def batches(seed: int = 0):
    return [make_batch(size, seed=seed + i) for i, size in enumerate(SIZES)]


class Rows(Dataset):
    """The batches' examples, one by one."""

    rows = [{name: batch[name][i] for name in batch} for batch in batches() for i in range(len(batch["labels"]))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def digest(model) -> str:
    """A hash of all weights."""
    hashed = hashlib.sha256()
    for tensor in model.state_dict().values():
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def score(folder: Path) -> dict:
    """Scores by every method."""
    accelerator = Accelerator(cpu=True)
    for method in METHODS:
        found = estimate_sensitivity(make_model(), batches(), method, accelerator=accelerator, progress=False)
        found.save(folder / f"{method}-{accelerator.process_index}.safetensors")
    return {"processes": accelerator.num_processes}


def make_trainer(folder: Path, **arguments) -> HapTrainer:
    args = TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=1, **arguments
    )
    config = HapConfig(ratio=0.5, max_examples=19, neuron_multiple=1)
    return HapTrainer(make_model(), args, train_dataset=Rows(), hap_config=config)


def prune(folder: Path) -> dict:
    """Trains, prunes, recovers and saves, and counts the files that it opened to write."""
    written = []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(folder)):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                written.append(arguments[0])

    sys.addaudithook(watch)
    trainer = make_trainer(folder, per_device_train_batch_size=4)
    trainer.train()
    trainer.save_model(str(folder / "dense"))
    plan = trainer.prune()
    with torch.no_grad():  # There shall be something to recover.
        trainer.model.classifier.weight[0].sub_(1.0)
    pruned = digest(trainer.model)
    trainer.train()
    agreed = {"plan": [plan.removed, plan.basis], "pruned": pruned, "recovered": digest(trainer.model)}
    agreed["recovery"] = trainer.results["recovery"]
    trainer.hap_config.recovery_learning_rate = 1e6
    trainer.optimizer = None  # It would keep its learning rate.
    trainer.train()
    agreed |= {"undone": trainer.results["recovery"]["step"] == 0, "at last": digest(trainer.model)}
    trainer.save_model()
    trainer.create_model_card()
    return {"agreed": agreed, "written": len(written)}


def others(folder: Path) -> dict:
    """Fine-tunes, prunes and recovers with trainers of other packages."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from test_language_trainers import sft
    from test_sentence_trainers import ranking, sentence_trainer

    own, agreed = folder / os.environ["RANK"], {}
    own.mkdir()
    config = HapConfig(ratio=0.5, max_examples=19, min_neurons=0.0)
    for name, trainer in (
        ("SFTTrainer", sft(own, hap_config=config)),
        ("SentenceTransformerTrainer", sentence_trainer(own, hap_config=config, loss=ranking)),
    ):
        trainer.train()
        plan = trainer.prune()
        pruned = digest(trainer.model)
        trainer.train()
        agreed[name] = [plan.removed, pruned, digest(trainer.model), trainer.results["recovery"]]
    return {"agreed": agreed}


def tune(folder: Path) -> dict:
    """Trains one layer; the first process has three batches, the second two, and then the second none."""
    accelerator = Accelerator(cpu=True)
    shared = tuned(slice(accelerator.process_index, None, 2), [3, 2], accelerator)
    alone = tuned(slice(0, 2 if accelerator.is_main_process else 0), [2, 0], accelerator)
    return {"weights": shared, "alone": alone}


def tuned(places: slice, counts: list[int], accelerator: Accelerator | None = None) -> list[list[float]]:
    """The weights of a layer that is trained on some batches of this process."""
    layer, data = tuning_problem()
    own = data[places]

    def loss(place: int, graph: bool) -> torch.Tensor:
        with torch.set_grad_enabled(graph):
            return (layer(own[place][0]) - own[place][1]).square().mean()

    train_layer(layer, "a layer", list(layer.parameters()), loss, counts, 2, 1e-2, accelerator)
    return [parameter.flatten().tolist() for parameter in layer.parameters()]


def tuning_problem():
    """A layer, and five batches of what it reads and what it should give."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3).double()
    return layer, [(torch.randn(6, 4).double(), torch.randn(6, 3).double()) for _ in range(5)]


def differ(folder: Path) -> dict:
    """Gives each process a different plan, then a plan to one process alone."""
    trainer, told = make_trainer(folder), []
    rank = trainer.accelerator.process_index
    before = digest(trainer.model)
    for plan in (PruningPlan.for_model(trainer.model, heads={0: [rank]}), None if rank else trainer_plan(trainer)):
        try:
            trainer.prune(plan)
        except ValueError as error:
            told.append(str(error))
    return {"told": told, "untouched": digest(trainer.model) == before}


def trainer_plan(trainer: HapTrainer) -> PruningPlan:
    return PruningPlan.for_model(trainer.model, heads={0: [0]})


def shard(folder: Path) -> dict:
    """Scores and saves a pruned model with sharded weights, and tries unsupported operations."""
    accelerator, told = Accelerator(cpu=True), []
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: range(5)}))
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for module in (*model.base_model.encoder.layer, model):
        fully_shard(module, mesh=mesh)
    differences = {}
    for method in METHODS:
        settings = {"method": method, "accelerator": accelerator, "progress": False}
        try:
            found = estimate_sensitivity(model, batches(), **settings)
        except ValueError as error:
            told.append(str(error))
            continue
        expected = estimate_sensitivity(whole, batches(), **{**settings, "accelerator": None})
        pairs = zip(found.heads + found.neurons, expected.heads + expected.neurons, strict=True)
        differences[method] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    for change in (lambda: apply_plan(model, PruningPlan.for_model(model, heads={0: [0]})), aligned(model)):
        try:
            change()
        except ValueError as error:
            told.append(str(error))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        whole.save_pretrained(folder / "whole")
        model.save_pretrained(folder / "sharded", state_dict=weights)
    return {"told": told, "differences": differences}


def aligned(model):
    return lambda: align_heads(model, batches(), progress=False)


def die(folder: Path) -> dict:
    """Kills one process during scoring."""
    accelerator = Accelerator(cpu=True)

    def killing():
        for i, batch in enumerate(batches()):
            if i == 3 and accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    estimate_sensitivity(make_model(), killing(), accelerator=accelerator, progress=False)
    return {}


def fail(folder: Path) -> dict:
    """Raises in one process during scoring."""
    accelerator = Accelerator(cpu=True)
    wrong = batches()
    if accelerator.process_index == 1:
        wrong[3] = {}
    estimate_sensitivity(make_model(), wrong, accelerator=accelerator, progress=False)
    return {}


if __name__ == "__main__":
    torch.manual_seed(0)
    mode, where = sys.argv[1], Path(sys.argv[2])
    result = {f.__name__: f for f in (score, prune, others, tune, differ, shard, die, fail)}[mode](where)
    (where / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Its threads may otherwise outlive what they use.
    # All is written. Threads of torch that are still there at a usual exit abort the process now and then.
    os._exit(0)
