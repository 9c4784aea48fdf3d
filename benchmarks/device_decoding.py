"""The section of `benchmarks.device` about generation: prefill and decoding of a language model, dense and pruned."""

import statistics
import time
from collections.abc import Iterator
from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hap_transformers import apply_plan, plan_pruning

from .device_sections import Sizes
from .latency import uneven_scores


RATIO = 0.3
# With a static cache, Transformers compiles a decoding step on GPUs.
CACHES = ("dynamic", "static")


def seconds_of(model: PreTrainedModel, prompt: torch.Tensor, new: int, cache: str) -> float:
    """Time of a greedy generation of so many tokens, no fewer."""
    if prompt.is_cuda:
        torch.cuda.synchronize(prompt.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=cache,
        pad_token_id=0,
    )
    if prompt.is_cuda:
        torch.cuda.synchronize(prompt.device)
    return time.perf_counter() - start


def measured(models: dict[str, PreTrainedModel], prompt: torch.Tensor, new: int, cache: str, repeats: int) -> dict:
    """Medians over rounds in which all models take turns: seconds of a first token, and tokens a second after it."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            first, all_of_them = (seconds_of(model, prompt, count, cache) for count in (1, new))
            if repeat:  # The first round compiles.
                found[name]["prefill"].append(first)
                found[name]["decode"].append(len(prompt) * (new - 1) / max(all_of_them - first, 1e-9))
    return {name: {phase: statistics.median(runs) for phase, runs in both.items()} for name, both in found.items()}


@torch.inference_mode()
def decoding(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Measures a Llama shape in bf16 with its own number of heads and neurons in each layer, against the dense one."""
    torch.manual_seed(0)
    with device:
        dense = LlamaForCausalLM(LlamaConfig(**sizes.llama)).to(torch.bfloat16).eval()
    pruned = deepcopy(dense)
    apply_plan(pruned, plan_pruning(uneven_scores(pruned), pruned, ratio=RATIO))
    length, new = sizes.generated
    for cache in CACHES:
        for batch in sizes.generation_batches:
            prompt = torch.randint(1, dense.config.vocab_size, (batch, length), device=device)
            found = measured({"dense": dense, "pruned": pruned}, prompt, new, cache, sizes.repeats // 2 + 1)
            yield {"cache": cache, "batch_size": batch, "length": length, "new": new, "removed": RATIO, **found}


def decoding_table(rows: list[dict]) -> str:
    """Formats prefill and decoding of both models."""
    heads = ["cache", "prompt", "prefill, ms: dense / pruned", "faster", "tokens a second: dense / pruned", "faster"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        dense, pruned = row["dense"], row["pruned"]
        cells = [
            f"{row['cache']}, {row['new']} tokens",
            f"{row['batch_size']} x {row['length']}",
            f"{1000 * dense['prefill']:.1f} / {1000 * pruned['prefill']:.1f}",
            f"{dense['prefill'] / pruned['prefill']:.2f}",
            f"{dense['decode']:.0f} / {pruned['decode']:.0f}",
            f"{pruned['decode'] / dense['decode']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
