"""Shows that a change of the code changes nothing that the package computes.

`python tests/equality.py record OUT` scores, plans, prunes, refits and saves the tiny model of every architecture by
every method, and writes a file for each pair into the folder OUT. `python tests/equality.py compare BEFORE AFTER`
compares two such folders. It fails where whole numbers, saved files or refusals differ, or floats by more than 1e-12.
Record both on one machine with the same packages: others may round otherwise.
"""

import argparse
import copy
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from zoo import ZOO, Tiny

from hap_transformers import METHODS, PruningPlan, apply_plan, estimate_sensitivity, plan_pruning, reconstruct


TOLERANCE = 1e-12
Values = dict[str, torch.Tensor]
Notes = dict[str, str]  # Hashes of saved files, and names of the errors of what is refused.
PLANS: dict[str, dict[str, Any]] = {
    "params": {"budget": "params", "ratio": 0.5, "neuron_multiple": 4},
    "heads": {"budget": "heads", "ratio": 0.5},
    "flops": {"budget": "flops", "ratio": 0.4},
    "implants": {"budget": "params", "ratio": 0.5, "neuron_multiple": 2, "implant_ratio": 0.3},
}


def make_batches(tiny: Tiny, model: transformers.PreTrainedModel) -> list[Values]:
    """Two batches of four examples, with a label for each example or, as the model has it, for each token."""
    batch = tiny.batch(8, dtype=model.dtype)
    with torch.no_grad():
        shape = model(**batch).logits.shape
    batch["labels"] = torch.arange(shape[:-1].numel()).view(shape[:-1]) % model.config.num_labels
    return [{name: value[part] for name, value in batch.items()} for part in (slice(4), slice(4, 8))]


def of_plan(plan: PruningPlan) -> Values:
    """What a plan says, as tensors."""
    parts = {"heads": plan.heads, "neurons": plan.neurons, "implants": plan.implants, "promise": plan.promise}
    numbers = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    types = {name: torch.float64 if isinstance(value, float) else torch.int64 for name, value in numbers.items()}
    return {name: torch.tensor(value, dtype=types[name]) for name, value in numbers.items()}


def hashes(folder: Path) -> Notes:
    """The SHA-256 of every file below a folder, of JSON without the release of Transformers.

    Weights have two: that of the header with names, types and shapes can be equal where the weights round otherwise.
    """
    found = {}
    for file in folder.iterdir():
        name, content = file.name, file.read_bytes()
        if file.suffix == ".json":
            fields = {key: value for key, value in json.loads(content).items() if key != "transformers_version"}
            content = json.dumps(fields, sort_keys=True).encode()
        if file.suffix == ".safetensors":
            header = content[: 8 + int.from_bytes(content[:8], "little")]
            found[name + " header"] = hashlib.sha256(header).hexdigest()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def prune(model: transformers.PreTrainedModel, plan: PruningPlan, batches: list[Values]) -> tuple[Values, Notes]:
    """The weights and the saved files of a pruned and refitted copy of a model."""
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan)
    reconstruct(pruned, model, batches, init_implants=tuple(plan.implants), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        return dict(pruned.state_dict()), hashes(Path(folder))


@contextmanager
def noting(notes: Notes, stage: str, title: str) -> Iterator[None]:
    """Notes an error instead of raising it: a refusal must stay one, with an error of the same class."""
    try:
        yield
    except Exception as error:
        notes[f"{stage}/refused"] = type(error).__name__
        tqdm.write(f"{title}, {stage}: {error!r:.200}")


def measure(architecture: str, method: str) -> tuple[Values, Notes]:
    """All that is compared of an architecture and a method."""
    tiny, scores, title = ZOO[architecture], None, f"{architecture}, {method}"
    values, notes = Values(), Notes()
    model = tiny.model(torch.float64)
    batches = make_batches(tiny, model)
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    with noting(notes, "scores", title):
        scores = estimate_sensitivity(model, batches, method, progress=False)
        values |= {f"scores/heads.{layer}": own for layer, own in enumerate(scores.heads)}
        values |= {f"scores/neurons.{layer}": own for layer, own in enumerate(scores.neurons)}
        if scores.reliability is not None:
            values["scores/reliability"] = torch.tensor(scores.reliability, dtype=torch.float64)
    for name, settings in PLANS.items() if scores is not None else ():
        with noting(notes, name, title):
            plan = plan_pruning(scores, model, inputs=inputs if name == "flops" else None, **settings)
            values |= {f"{name}/{key}": value for key, value in of_plan(plan).items()}
            weights, files = prune(model, plan, batches)
            values |= {f"{name}/weights.{key}": value for key, value in weights.items()}
            notes |= {f"{name}/{key}": digest for key, digest in files.items()}
    return values, notes


def record(folder: Path) -> None:
    """Writes a file for every architecture and method, with the values as tensors and the notes as metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(architecture, method) for architecture in ZOO for method in METHODS]
    for architecture, method in tqdm(pairs, "Recording"):
        values, notes = measure(architecture, method)
        values = {name: value.clone().contiguous() for name, value in values.items()}  # Some share memory.
        save_file(values, folder / f"{architecture}-{method}.safetensors", metadata=notes)


def read(file: Path) -> tuple[Values, Notes]:
    """What `record` wrote into a file."""
    with safe_open(file, framework="pt") as opened:
        values = {name: opened.get_tensor(name) for name in opened.keys()}
        return values, {name: note for name, note in (opened.metadata() or {}).items() if name != "format"}


def distance(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """The largest absolute difference of two tensors: infinite where they are not alike, `None` if bit-equal."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return torch.inf
    if first.numpy().tobytes() == second.numpy().tobytes():
        return None
    differ = (first != second) & ~(first.isnan() & second.isnan())
    return float((first.double() - second.double()).abs()[differ].nan_to_num(torch.inf).max()) if differ.any() else 0.0


def compare_files(before: Path, after: Path) -> tuple[list[str], float, int, int]:
    """The differences of two files, the largest one of numbers, how many tensors are bit-equal, and of how many."""
    (values, notes), (new_values, new_notes) = read(before), read(after)
    both = sorted(values.keys() & new_values.keys())
    differences = [f"{name}: only in one" for name in sorted(values.keys() ^ new_values.keys())]
    found = {name: distance(values[name], new_values[name]) for name in both}
    rounded = {name: largest for name, largest in found.items() if largest is not None}
    wrong = [name for name in rounded if rounded[name] > TOLERANCE or not values[name].is_floating_point()]
    differences += [f"{name}: {rounded[name]:.3g}" for name in wrong]
    # Where weights are not bit-equal, but within the tolerance, the files that hold them may differ, too.
    excused = {name.partition("/")[0] for name in rounded.keys() - wrong if "/weights." in name}
    for name in sorted(notes.keys() | new_notes.keys()):
        pair = notes.get(name), new_notes.get(name)
        if pair[0] != pair[1] and not (name.endswith(".safetensors") and name.partition("/")[0] in excused):
            differences.append(f"{name}: {pair[0]} and {pair[1]}")
    return differences, max(rounded.values(), default=0.0), len(both) - len(rounded), len(values)


def compare(before: Path, after: Path) -> bool:
    """Prints how two recorded folders differ, and says whether they are equal within the tolerance."""
    names, others = ({file.name for file in folder.glob("*.safetensors")} for folder in (before, after))
    wrong, largest, equal, total = len(names ^ others), 0.0, 0, 0
    for name in tqdm(sorted(names | others), "Comparing"):
        if name not in names & others:
            tqdm.write(f"{name}: only in one folder")
            continue
        differences, own_largest, own_equal, own_total = compare_files(before / name, after / name)
        tqdm.write("\n  ".join([f"{name}: {own_largest:.3g}", *differences]))
        wrong, largest = wrong + len(differences), max(largest, own_largest)
        equal, total = equal + own_equal, total + own_total
    print(f"{len(names | others)} files, {wrong} differences, the largest one of numbers {largest:.3g}")
    print(f"{equal} of {total} tensors are bit-equal")
    return bool(names) and not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("folders", type=Path, nargs="+", help="OUT, or BEFORE AFTER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # So that sums are added up in one order.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hap_transformers").setLevel(logging.ERROR)
    if arguments.command == "record":
        record(*arguments.folders)
    elif not compare(*arguments.folders):
        sys.exit(1)


if __name__ == "__main__":
    main()
