"""Fine-tunes, scores, prunes and recovers a text classifier, and saves the smaller model.

With no arguments it runs the embedded demo. The same command goes on where it was killed. Some others:

    python run_glue_hap.py --model_name_or_path google-bert/bert-base-uncased --task_name mrpc --output_dir out
    python run_glue_hap.py --model_name_or_path FOLDER --task_name sst2 --data_dir PARQUET_FOLDER --output_dir out
    python run_glue_hap.py --train_file train.csv --validation_file validation.csv --ratio 0.5 --output_dir out
    python run_glue_hap.py flags.yaml
"""

import copy
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import DatasetDict
from demo_data import DEMO_MODEL, demo_model_path, load_demo_task
from stages import Stages
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

import hap_transformers
from hap_transformers import HapConfig, HapTrainer
from hap_transformers.components.releases import TRANSFORMERS_4
from hap_transformers.components.structure import recorded_structure
from hap_transformers.data.tasks import Task, load_task, load_tokenizer
from hap_transformers.efficiency import compare_latency, count_encoder_parameters, count_flops, count_parameters
from hap_transformers.files import write_text
from hap_transformers.reporting.card import COSTS
from hap_transformers.reporting.page import interval, write_report
from hap_transformers.reporting.plots import plot_head_sensitivity
from hap_transformers.training.resuming import RECOVERY


PICTURE = "head_sensitivity.png"

# What suits GLUE on a small machine, where it differs from TrainingArguments and HapConfig.
DEFAULTS = {
    "output_dir": "outputs/demo",
    "num_train_epochs": 2.0,
    "recovery_epochs": 1.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "logging_steps": 0.05,  # Twenty points of the training curve.
    "report_to": ["none"],
    "dataloader_pin_memory": torch.cuda.is_available(),  # Without a GPU, asking for it only gives a warning.
    # Sentences of like length together save half the padding.
    **({"group_by_length": True} if TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}),
}


@dataclass
class ScriptArguments:
    """Which model and which data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a supported model; by default the MiniLM from PyPI."}
    )
    task_name: str | None = field(default=None, metadata={"help": "A GLUE task; by default the embedded demo."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with TASK/{train,validation}.parquet, read instead of the Hub."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own CSV or JSON file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Your own CSV or JSON file to validate on."})
    demo_file: str | None = field(
        default=None, metadata={"help": "The demo's source distribution, downloaded before."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this many tokens."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many examples, drawn by seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on the first this many examples."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the whole job and returns what `results.json` holds."""
    command = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((ScriptArguments, TrainingArguments, HapConfig), description=__doc__.splitlines()[0])
    if len(command) == 1 and Path(command[0]).suffix in (".json", ".yaml", ".yml"):
        values = yaml.safe_load(Path(command[0]).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"'{command[0]}' has no flags; expected a name and a value a line, such as 'ratio: 0.5'.")
        lists = {name: own if isinstance(own, list) else [own] for name, own in values.items() if own is not None}
        command = [word for name, own in lists.items() for word in (f"--{name}", *map(str, own))]
    parser.set_defaults(**DEFAULTS)
    script, args, hap_config = parser.parse_args_into_dataclasses(command)
    set_seed(args.seed)
    output = Path(args.output_dir)
    own = (script.task_name, script.data_dir, script.train_file, script.validation_file)
    task = load_task(*own) if any(own) else load_demo_task(script.demo_file)
    _limit_samples(task, script, args.seed)
    if args.process_index == 0:
        kind = f"classes {', '.join(task.labels)}" if task.labels else "a regression"
        print(f"{task.name}: text of {' and '.join(task.texts)}, {kind}")
    model_path = script.model_name_or_path or demo_model_path()
    with args.main_process_first(local=False, desc="looking for what an earlier run has finished"):
        stages = Stages(output, command)
    config = AutoConfig.from_pretrained(model_path, num_labels=task.num_labels, finetuning_task=task.name)
    if recorded_structure(config) is not None:
        raise ValueError(
            f"'{model_path}' is pruned already, and this script begins with a dense model. To prune further, call "
            "HapTrainer.prune() in Python."
        )
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    else:
        config.problem_type = "regression"
    tokenizer = load_tokenizer(model_path)
    fine_tuned = stages.dense.exists()
    model = AutoModelForSequenceClassification.from_pretrained(
        stages.dense if fine_tuned else model_path, config=config
    )
    model.config.name_or_path = model_path  # Not where a run that was killed has kept it.
    data = task.tokenize(tokenizer, script.max_seq_length)
    trainer = HapTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=task.metrics(),
        processing_class=tokenizer,
        hap_config=hap_config,
    )

    seconds: dict[str, float] = {}
    if not fine_tuned:
        with _phase("fine-tune", seconds, args):
            trainer.train(resume_from_checkpoint=stages.checkpoint())
        trainer.evaluate()
        history = {"fine-tune": trainer.state.log_history}
        stages.save_dense(trainer, metrics=trainer.results["metrics"], seconds=seconds, history=history)
    figures = stages.figures()
    trainer.results["metrics"], seconds, history = (figures[name] for name in ("metrics", "seconds", "history"))
    dense = copy.deepcopy(trainer.model)
    with _phase("score", seconds, args):
        sensitivity = stages.scores(trainer)
    with _phase("prune", seconds, args):
        plan = trainer.prune(trainer.plan(sensitivity))
    trainer.evaluate()
    with _phase("recover", seconds, args):
        trainer.train(resume_from_checkpoint=stages.checkpoint(RECOVERY))
    history["recover"] = trainer.state.log_history
    trainer.evaluate()

    inputs = _one_batch(trainer, data)
    latency = _latency({"dense": dense, "pruned": trainer.model}, inputs, trainer)
    results = {
        "task": task.name,
        "model": _public_name(script.model_name_or_path) if script.model_name_or_path else DEMO_MODEL,
        "metrics": trainer.results["metrics"],
        "num_examples": {split: len(rows) for split, rows in data.items()},
        "heads": {"dense": sum(plan.original_heads), "pruned": sum(plan.original_heads) - plan.num_heads},
        "parameters": {"dense": count_parameters(dense), "pruned": count_parameters(trainer.model)},
        "encoder_parameters": {
            "dense": count_encoder_parameters(dense),
            "pruned": count_encoder_parameters(trainer.model),
        },
        "flops": {"dense": count_flops(dense, inputs), "pruned": count_flops(trainer.model, inputs)},
        "bytes": {
            name: model.get_memory_footprint(return_buffers=False)
            for name, model in (("dense", dense), ("pruned", trainer.model))
        },
        "latency_ms": {name: 1000 * value for name, value in latency.items()},
        "batch": list(inputs["input_ids"].shape),
        "reliability": sensitivity.reliability,
        "seconds": seconds,
        "seed": args.seed,
        "history": history,
        "hap_config": asdict(hap_config),
        "training": {
            name: getattr(args, name)
            for name in ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "bf16", "fp16")
        },
        "versions": {
            "hap_transformers": hap_transformers.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    trainer.save_model()
    trainer.results.update({name: results[name] for name in COSTS if name in results})
    about = {"finetuned_from": None if script.model_name_or_path else DEMO_MODEL}
    if script.task_name:
        names = {"dataset": f"GLUE {task.name}", "dataset_tags": "glue", "dataset_args": task.name}
        about.update(names)  # Other data have no name on the Hub.
    if trainer.is_world_process_zero():
        sensitivity.model = ""  # The dense model is not kept.
        sensitivity.save(output / "sensitivity.safetensors")
        plan.save(output / "pruning_plan.json")
        plot_head_sensitivity(sensitivity, output / PICTURE, plan)
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
        write_report(output)
    trainer.create_model_card(**about)
    if args.push_to_hub:
        trainer.push_to_hub(**about)
    if not trainer.is_world_process_zero():
        return results
    stages.finish()
    print(_table(results))
    print(f"Saved to {output}. Load it with `import hap_transformers` and plain from_pretrained('{output}').")
    return results


def _public_name(model: str) -> str:
    """A Hub name as it is; of a folder, only its last part, so that results do not tell where they were made."""
    return Path(model).resolve().name if Path(model).exists() else model


def _limit_samples(task: Task, script: ScriptArguments, seed: int) -> None:
    train, validation = task.data["train"], task.data["validation"]
    if script.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(script.max_train_samples, len(train))))
    if script.max_eval_samples is not None:
        validation = validation.select(range(min(script.max_eval_samples, len(validation))))
    for name, split in (("training", train), ("validation", validation)):
        if not len(split):
            raise ValueError(f"Task '{task.name}' has no {name} examples.")
    task.data = DatasetDict(train=train, validation=validation)


@contextmanager
def _phase(name: str, seconds: dict[str, float], args: TrainingArguments) -> Iterator[None]:
    """Keeps the seconds, and sets the seed: what a phase draws must not depend on whether those before it ran."""
    set_seed(args.seed)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _one_batch(trainer: HapTrainer, data: DatasetDict) -> dict[str, torch.Tensor]:
    """The first 32 validation examples, on the model's device, without labels."""
    rows = [
        {name: row[name] for name in row if name != "label"}
        for row in data["validation"].select(range(min(32, len(data["validation"]))))
    ]
    batch = trainer.data_collator(rows)
    return {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}


def _latency(models: dict[str, Any], inputs: dict[str, torch.Tensor], trainer: HapTrainer) -> dict[str, float]:
    """Seconds of models in the trainer's precision, whether it has prepared them before or not."""
    bare = {
        name: trainer.accelerator.unwrap_model(copy.deepcopy(model), keep_fp32_wrapper=False)
        for name, model in models.items()
    }
    with trainer.accelerator.autocast():
        return compare_latency(bare, inputs)


def _table(results: dict[str, Any]) -> str:
    """The results as one table for the terminal."""
    names = [name for name in results["metrics"]["dense"] if name != "loss"] + ["loss"]
    rows = [["", *names, "heads", "encoder", "parameters", "GFLOPs", "latency ms"]]
    for phase, metrics in results["metrics"].items():
        size = "dense" if phase == "dense" else "pruned"
        rows.append(
            [phase]
            + [f"{metrics[name]:.4f}" for name in names]
            + [str(results["heads"][size])]
            + [f"{results[key][size]:,}" for key in ("encoder_parameters", "parameters")]
            + [f"{results['flops'][size] / 1e9:.2f}", f"{results['latency_ms'][size]:.1f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    batch = " x ".join(map(str, results["batch"]))
    title = f"{results['task']}: {results['num_examples']['validation']} validation examples; cost of a {batch} batch"
    config = results["hap_config"]
    if config["budget"] == "params":
        lines.append(f"Of the encoder's parameters {config['ratio']:.0%} were to go; embeddings and classifier stay.")
    found = interval(names[0], results["metrics"]["recovered"][names[0]], results["num_examples"]["validation"])
    if found:
        lines.append(
            f"95 % interval of the recovered {names[0]} over validation examples: {found[0]:.3f} to {found[1]:.3f}; "
            "those of the other rows are as wide."
        )
    reliability = results["reliability"]
    if reliability is not None:
        lines.append(
            f"Reliability of the ranking of heads: {reliability:.2f} (1 repeats on another sample, 0 is noise)"
        )
    return "\n".join(["", title, *lines])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"run_glue_hap.py: {error}")
