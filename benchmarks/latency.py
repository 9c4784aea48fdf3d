"""Measures how much of the removed FLOPs a pruned model saves in seconds, against the dense model in the same rounds.

It also plans by latency, and measures what of a plan's promise a pruned model keeps.

    python -m benchmarks.latency

Models have the shapes of MiniLM and BERT-base and random weights. Every layer loses the same share. Nothing else
should run on the machine. The command prints tables and writes JSON.
"""

import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel, HfArgumentParser

from hap_transformers import LatencyTable, PruningPlan, Sensitivity, apply_plan, plan_pruning
from hap_transformers.components.groups import by_kind, find_groups
from hap_transformers.efficiency import compare_latency, count_flops

from .markdown_table import latency_table, multiples_table, promises_table


HERE = Path(__file__).parent
MODELS = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
SHARES = (0.2, 0.4, 0.6, 0.8)
PROMISED_SHARES, PROMISED_BATCHES = (0.4, 0.6, 0.8), ((1, 128), (8, 128), (32, 128))


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str = str(HERE / "latency.json")
    seconds: float = 12.0  # Of measuring for each combination, in at least five rounds.
    threads: int = 2


def pruned(model: BertModel, inputs: dict[str, torch.Tensor], share: float, multiple: int = 16) -> BertModel:
    """Copies a model without a share of its FLOPs on these inputs: heads go first, then neurons, to a multiple."""
    config = model.config
    length, hidden, head_dim = inputs["input_ids"].shape[1], config.hidden_size, config.hidden_size // 12
    head, neuron = 8 * length * hidden * head_dim + 4 * length**2 * head_dim, 4 * length * hidden
    heads = round(share * 12)
    excess = share * (12 * head + config.intermediate_size * neuron) - heads * head
    left = min(round((config.intermediate_size - excess / neuron) / multiple) * multiple, config.intermediate_size)
    layers = range(config.num_hidden_layers)
    smaller = copy.deepcopy(model)
    neurons = range(left, config.intermediate_size)
    plan = PruningPlan.for_model(
        smaller, heads={layer: range(heads) for layer in layers}, neurons={layer: neurons for layer in layers}
    )
    apply_plan(smaller, plan)
    return smaller


def rounds(
    models: dict[object, BertModel], inputs: dict[str, torch.Tensor], seconds: float
) -> dict[object, list[float]]:
    """Measures the seconds of a forward pass of each model, in rounds in which all take turns."""
    times: dict[object, list[float]] = {name: [] for name in models}
    start, number = None, 0
    while number < 7 or time.perf_counter() - start < seconds:
        for name, model in models.items():
            began = time.perf_counter()
            model(**inputs)
            times[name].append(time.perf_counter() - began)
        number += 1
        if number == 2:  # Two rounds warm up.
            start = time.perf_counter()
    return {name: values[2:] for name, values in times.items()}


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """Computes the quartiles of the ratios of two contenders' times in the same round."""
    values = [a / b for a, b in zip(over, under, strict=True)]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"time": median, "lower": lower, "upper": upper}


def make_inputs(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Makes a batch of random tokens without padding."""
    tokens = torch.randint(0, 1000, (batch_size, length))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def measure_shares(args: Arguments) -> list[dict]:
    """Measures every model, number format, batch size and length."""
    rows = []
    for name, sizes in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            dense = BertModel(BertConfig(num_attention_heads=12, vocab_size=1000, **sizes)).to(dtype).eval()
            for batch_size, length in ((1, 64), (1, 128), (32, 64), (32, 128)):
                inputs = make_inputs(batch_size, length)
                models = {0.0: dense, **{share: pruned(dense, inputs, share) for share in SHARES}}
                flops = {share: count_flops(model, inputs) for share, model in models.items()}
                times = rounds(models, inputs, args.seconds)
                for share in SHARES:
                    rows.append(
                        {
                            "model": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "batch_size": batch_size,
                            "length": length,
                            "share": share,
                            "flops": flops[share] / flops[0.0],
                            **ratios(times[share], times[0.0]),
                            "dense_ms": 1000 * statistics.median(times[0.0]),
                            "rounds": len(times[0.0]),
                        }
                    )
                print(f"{name} {dtype} {batch_size} x {length}", file=sys.stderr)
    return rows


def measure_multiples(args: Arguments) -> list[dict]:
    """Measures the time a FLOP for several numbers of kept neurons, over that of 608, a multiple of 16."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = BertModel(BertConfig(num_attention_heads=12, vocab_size=1000, **MODELS["MiniLM"])).to(dtype).eval()
        inputs = make_inputs(32, 128)
        layers = range(dense.config.num_hidden_layers)
        models = {}
        for left in (608, 613, 614, 612, 616, 640):
            models[left] = copy.deepcopy(dense)
            gone = {layer: range(left, dense.config.intermediate_size) for layer in layers}
            apply_plan(models[left], PruningPlan.for_model(models[left], neurons=gone))
        flops = {left: count_flops(model, inputs) for left, model in models.items()}
        times = rounds(models, inputs, 5 * args.seconds)
        for left in models:
            a_flop = {count: [value / flops[count] for value in times[count]] for count in (left, 608)}
            row = {"dtype": str(dtype).removeprefix("torch."), "neurons": left}
            rows.append({**row, **ratios(a_flop[left], a_flop[608]), "rounds": len(times[left])})
    return rows


def uneven_scores(model: BertModel) -> Sensitivity:
    """Makes scores that differ between layers and components by orders of magnitude, as the default method's do."""
    scores = {
        kind.name: [torch.randn(group.num_components, dtype=torch.float64).exp() for group in groups]
        for kind, groups in by_kind(find_groups(model)).items()
    }
    return Sensitivity("kronecker", scores, comparable=True, foresees_refit=True)


def measure_promises(args: Arguments) -> list[dict]:
    """Measures the latency that plans promise against that of the models pruned by them, both over the dense one's.

    A latency table is measured for each batch; plans with it remove shares of the encoder's seconds.
    """
    rows = []
    dense = BertModel(BertConfig(num_attention_heads=12, vocab_size=1000, **MODELS["MiniLM"])).eval()
    for batch_size, length in PROMISED_BATCHES:
        inputs = make_inputs(batch_size, length)
        rows += [{"model": "MiniLM", **row} for row in promises(dense, inputs, PROMISED_SHARES, args.seconds)]
        print(f"promises, {batch_size} x {length}", file=sys.stderr)
    return rows


def promises(
    dense: BertModel, inputs: dict[str, torch.Tensor], shares: Sequence[float], seconds: float, mode: str = "eager"
) -> Iterator[dict]:
    """Measures a latency table for a batch, and what of its promises the models pruned by its plans keep.

    Args:
        dense (`BertModel`): The dense model.
        inputs (`dict[str, torch.Tensor]`): The batch.
        shares (`Sequence[float]`): The shares of the encoder's seconds to remove.
        seconds (`float`): Of measuring for each share, in at least fifteen rounds.
        mode (`str`, *optional*, defaults to `"eager"`): How the models run.
    """
    scores = uneven_scores(dense)
    table = LatencyTable.measure(dense, inputs, mode=mode, progress=False)
    groups = find_groups(dense)
    whole = table.outside + sum(table.cost(group.kind.name, group.num_components) for group in groups)
    batch_size, length = inputs["input_ids"].shape
    for share in shares:
        plan = plan_pruning(scores, dense, budget="latency", ratio=share, latency_table=table, latency_mode=mode)
        smaller = copy.deepcopy(dense)
        apply_plan(smaller, plan)
        repeats = max(15, round(seconds / (2 * whole)))
        found = compare_latency({"dense": dense, "pruned": smaller}, inputs, repeats, mode=mode)
        promised, measured = plan.promise["latency"] / whole, found["pruned"] / found["dense"]
        row = {"batch_size": batch_size, "length": length, "share": share}
        yield {**row, "promised": promised, "measured": measured, "error": promised / measured - 1}


def main() -> None:
    """Measures, prints and writes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        results = {
            "promises": measure_promises(args),
            "rows": measure_shares(args),
            "multiples": measure_multiples(args),
        }
    results["machine"] = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tables = (
        latency_table(results["rows"]),
        multiples_table(results["multiples"]),
        promises_table(results["promises"]),
    )
    print("\n\n".join(tables))
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
