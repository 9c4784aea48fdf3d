"""Trims MiniLM's vocabulary to a task's training split, and measures what that costs on the validation split.

    python -m benchmarks.vocabulary --data_dir ../shared/glue

MiniLM is fine-tuned on each task, as in `glue_scripts.compare_glue`, whose dense models are used if they are in
`--dense_dir`. Outputs change only for texts that are split otherwise; these are counted, too. Fine-tuning takes some
minutes a task, the rest half a minute. `docs.render_results` makes the table.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from transformers import HfArgumentParser

from glue_scripts.compare_glue.job import Job
from glue_scripts.compare_glue.settings import MAX_LENGTH
from hap_transformers import trim_vocabulary

from .embeddings_data import sentences_of


HERE = Path(__file__).parent


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "vocabulary.json")
    dense_dir: str = field(default="outputs/compare", metadata={"help": "Output folder of compare_glue."})
    tasks: list[str] = field(default_factory=lambda: ["cola", "mrpc", "sst2", "stsb"])
    seeds: list[int] = field(default_factory=lambda: [0])


def row(job: Job, data_dir: str) -> dict:
    """The figures of one task and seed."""
    model, tokenizer = job.dense(), job.tokenizer
    texts = {split: sentences_of(data_dir, job.name, split) for split in ("train", "validation")}
    before, dense = [tokenizer.tokenize(text) for text in texts["validation"]], job.measure(model)
    plan = trim_vocabulary(model, tokenizer, texts["train"])
    after = [tokenizer.tokenize(text) for text in texts["validation"]]
    job.evaluated = job.task.tokenize(tokenizer, MAX_LENGTH)["validation"]
    return {
        "task": job.name,
        "seed": job.seed,
        "texts": len(texts["train"]),
        "tokens": plan.size,
        "kept": len(plan.kept),
        "parameters": plan.parameters,
        "validation_texts": len(before),
        "split_otherwise": sum(old != new for old, new in zip(before, after, strict=True)),
        "unknown_tokens": sum(tokens.count(tokenizer.unk_token) for tokens in after)
        - sum(tokens.count(tokenizer.unk_token) for tokens in before),
        "dense": dense,
        "trimmed": job.measure(model),
    }


def main() -> None:
    """Measures all tasks."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    jobs = (Job(task, seed, args.data_dir, args.dense_dir) for task, seed in product(args.tasks, args.seeds))
    rows = [row(job, args.data_dir) for job in jobs]
    Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
