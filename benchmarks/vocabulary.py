"""Trims MiniLM's vocabulary to a task's training split, and counts the validation texts that are split otherwise then.

    python -m benchmarks.vocabulary --data_dir ../shared/glue

A model's outputs for all other texts are the same. So its accuracy can change by no more than this share. A minute on
one core. `docs.render_results` makes the table.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from glue_scripts.compare_glue.base_models import BASE_MODELS
from hap_transformers import trim_vocabulary

from .embeddings_data import sentences_of
from .whole_model import MODEL


HERE = Path(__file__).parent


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "vocabulary.json")
    cache: str = field(default="build/embeddings", metadata={"help": "Where downloaded models are unpacked."})
    model: str = MODEL
    tasks: list[str] = field(default_factory=lambda: ["cola", "mrpc", "sst2", "stsb"])


def row(task: str, data_dir: str, folder: Path) -> dict:
    """The figures of one task."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = {split: sentences_of(data_dir, task, split) for split in ("train", "validation")}
    before = [tokenizer.tokenize(text) for text in texts["validation"]]
    plan = trim_vocabulary(model, tokenizer, texts["train"])
    after = [tokenizer.tokenize(text) for text in texts["validation"]]
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    return {
        "task": task,
        "texts": len(texts["train"]),
        "tokens": plan.size,
        "kept": len(plan.kept),
        "parameters": plan.parameters,
        "validation_texts": len(before),
        "split_otherwise": len(changed),
        "unknown_tokens": sum(tokens.count(tokenizer.unk_token) for tokens in after)
        - sum(tokens.count(tokenizer.unk_token) for tokens in before),
    }


def main() -> None:
    """Measures all tasks."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folder = BASE_MODELS[args.model].folder(Path(args.cache))
    rows = [row(task, args.data_dir, folder) for task in args.tasks]
    Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
