"""Leaves out directions of a BERT's residual stream, to see what a narrower stream would cost.

    python -m benchmarks.residual_width --data_dir ../shared/glue

This is a bound, and nothing gets smaller: what every layer norm gives is projected, but the norms still see the whole
stream, and projections are as they were. With one basis for the whole stream, all matrices get narrower. With a basis
for each norm, as in SliceGPT ([arXiv 2401.15024](https://arxiv.org/abs/2401.15024)), each addition needs a matrix more
between two bases. Nothing is refitted; `default` is what a budget of the whole model does with as many parameters,
without its refit and with it. Ten minutes on one core. `docs.render_results` makes the table.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import HfArgumentParser

from hap_transformers import SelfLoss, apply_plan, plan_pruning, reconstruct
from hap_transformers.efficiency import count_parameters

from .embeddings_cells import EXAMPLES, HOME
from .embeddings_data import Encoder, HeldOut, calibration_sentences
from .embeddings_quality import rank_correlation
from .whole_model import MODEL, WAYS, Bench


HERE = Path(__file__).parent
# Share of the mean second moment that is added to all directions before they are inverted.
DAMPING = 1e-4


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "residual_width.json")
    cache: str = field(default="build/embeddings", metadata={"help": "Where downloaded models are unpacked."})
    model: str = MODEL
    widths: list[float] = field(default_factory=lambda: [0.95, 0.9, 0.8])


@dataclass
class Stream:
    """What a norm gives: its mean, the second moment around it, and that of the cotangents of the embeddings."""

    mean: torch.Tensor
    moment: torch.Tensor
    curvature: torch.Tensor


def norms_of(encoder: Encoder) -> list[nn.Module]:
    """The norms of the residual stream, in the order in which they run."""
    return [module for module in encoder.model.modules() if isinstance(module, nn.LayerNorm)]


def streams(encoder: Encoder, sentences: list[str]) -> list[Stream]:
    """What every norm gives on some sentences; padding does not count."""
    norms = norms_of(encoder)
    width, tokens, loss = norms[0].normalized_shape[0], 0, SelfLoss()
    sums = [[torch.zeros(size, dtype=torch.float64) for size in ((width,), *[(width, width)] * 2)] for _ in norms]
    for batch in encoder.batches(sentences):
        given: list[torch.Tensor] = []
        hooks = [norm.register_forward_hook(partial(_note, given)) for norm in norms]
        embedding = loss.embedding(encoder.model, encoder.model(**batch), batch)
        signs = torch.randint(0, 2, embedding.shape) * 2.0 - 1
        cotangents = torch.autograd.grad((embedding * signs).sum(), given)
        for hook in hooks:
            hook.remove()
        valid = batch["attention_mask"].bool()
        tokens += int(valid.sum())
        for (first, second, curvature), output, cotangent in zip(sums, given, cotangents, strict=True):
            x, g = output.detach()[valid].double(), cotangent[valid].double()
            first += x.sum(0)
            second += x.T @ x
            curvature += g.T @ g
    return [
        Stream(first / tokens, second / tokens - torch.outer(first, first) / tokens**2, curvature / tokens)
        for first, second, curvature in sums
    ]


def _note(given: list[torch.Tensor], norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    given.append(output)


def principal(stream: Stream, rank: int) -> torch.Tensor:
    """The projection on the directions of most variance."""
    directions = torch.linalg.eigh(stream.moment).eigenvectors[:, -rank:]
    return directions @ directions.T


def output_aware(stream: Stream, rank: int) -> torch.Tensor:
    """The projection that changes the embeddings least, to second order: the best of its rank in both metrics."""
    moment = stream.moment + DAMPING * stream.moment.trace() / len(stream.moment) * torch.eye(len(stream.moment))
    root = torch.linalg.cholesky(moment)
    directions = torch.linalg.eigh(root.T @ stream.curvature @ root).eigenvectors[:, -rank:]
    return root @ directions @ torch.linalg.solve_triangular(root, directions.T, upper=False, left=False)


CHOICES: dict[str, Callable[[Stream, int], torch.Tensor]] = {"variance": principal, "output-aware": output_aware}


@contextmanager
def projected(encoder: Encoder, projections: list[torch.Tensor], means: list[torch.Tensor]) -> Iterator[None]:
    """Projects what every norm gives, around its mean."""

    def hook(projection: torch.Tensor, mean: torch.Tensor) -> Callable:
        return lambda module, inputs, output: mean + (output - mean) @ projection.T

    triples = zip(norms_of(encoder), projections, means, strict=True)
    hooks = [norm.register_forward_hook(hook(p.float(), mean.float())) for norm, p, mean in triples]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def joined(found: list[Stream]) -> list[Stream]:
    """The same moments for all norms: the means over them."""
    moment, curvature = (torch.stack([getattr(s, name) for s in found]).mean(0) for name in ("moment", "curvature"))
    return [Stream(stream.mean, moment, curvature) for stream in found]


def parameters_with(encoder: Encoder, rank: int, bases: int) -> int:
    """Parameters of the encoder with a stream of this width, and a matrix between any two bases."""
    width = norms_of(encoder)[0].normalized_shape[0]
    return round(count_parameters(encoder.model) * rank / width) + (bases - 1) * rank**2


def measure(args: Arguments) -> list[dict]:
    """A row a width, way to choose and number of bases, and two of the default with the most parameters of these."""
    bench = Bench(Encoder.load(args.model, Path(args.cache)), HeldOut.load(args.data_dir), args.data_dir)
    encoder, sentences = bench.encoder, calibration_sentences(args.data_dir, HOME, 0, EXAMPLES)
    separate = streams(encoder, sentences)
    width, rows = len(separate[0].mean), []
    default, scores, _ = bench.scored(WAYS["model"], 0)

    def row(way: str, parameters: int, model: Encoder) -> dict:
        embeddings, count = bench.embedded(model), len(bench.rated)
        spearman = rank_correlation(embeddings, torch.arange(count).view(-1, 2), bench.held_out.ratings)
        cosine = float((embeddings * bench.dense).sum(1)[:count].mean())
        return {"way": way, "parameters": parameters, "spearman": round(spearman, 5), "cosine": round(cosine, 5)}

    dense = count_parameters(encoder.model)
    for share in args.widths:
        rank = round(share * width)
        for (bases, found), choice in product({1: joined(separate), len(separate): separate}.items(), CHOICES):
            projections = [CHOICES[choice](stream, rank) for stream in found]
            with projected(encoder, projections, [stream.mean for stream in separate]):
                name = f"{choice}, {'one basis' if bases == 1 else 'a basis for each norm'}"
                rows.append({"width": rank, **row(name, parameters_with(encoder, rank, bases), encoder)})
        smaller = copy.deepcopy(default)
        ratio = 1 - parameters_with(encoder, rank, 1) / dense
        apply_plan(smaller.model, plan_pruning(scores, smaller.model, budget="model", ratio=ratio))
        rows.append({"width": width, **row("default, no refit", count_parameters(smaller.model), smaller)})
        reconstruct(smaller.model, default.model, smaller.batches(sentences), progress=False)
        rows.append({"width": width, **row("default", count_parameters(smaller.model), smaller)})
    return [{"width": width, **row("dense", dense, encoder)}, *rows]


def main() -> None:
    """Measures all widths."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    rows = measure(args)
    for found in rows:
        print(*found.values())
    Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
