"""Fine-tunes, scores, prunes and recovers a text classifier, and saves the smaller model.

With no arguments it runs the embedded demo. A run that was killed continues by the same command. Other uses:

    python run_glue_hap.py --model_name_or_path google-bert/bert-base-uncased --task_name mrpc --output_dir out
    python run_glue_hap.py --model_name_or_path FOLDER --task_name sst2 --data_dir PARQUET_FOLDER --output_dir out
    python run_glue_hap.py --train_file train.csv --validation_file validation.csv --ratio 0.5 --output_dir out
    python run_glue_hap.py flags.yaml
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.components.releases import GROUPED_BY_LENGTH
from hap_transformers.components.structure import recorded_structure
from hap_transformers.data.demo import DEMO_MODEL, demo_model_path, load_demo_task
from hap_transformers.data.tasks import Task, load_task
from hap_transformers.data.tokenizers import cut_note, load_tokenizer, set_padding, validate_tokens
from hap_transformers.efficiency import bf16_is_fast
from hap_transformers.reporting.card import COSTS
from hap_transformers.reporting.results import collect_results, public_name, results_table, save_results
from hap_transformers.training.stages import FinishedRun, Stages, run_stages


# Defaults for GLUE on a small machine, where they differ from those of TrainingArguments and HapConfig.
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
    **GROUPED_BY_LENGTH,  # Half of the padding is saved.
    # Fast bf16 takes a third of the time of float32. On a CPU, Trainer takes bf16 only with `use_cpu`.
    "bf16": bf16_is_fast(),
    "use_cpu": bf16_is_fast() and not torch.cuda.is_available(),
}
# The demo shows the same with less training.
DEMO_DEFAULTS = {"num_train_epochs": 1.0, "recovery_epochs": 0.5}
# FLOPs and latency are those of so many validation examples: enough for matrix products to take most of the time.
COST_EXAMPLES = 32


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
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of your own files, such as latin-1; by default UTF-8."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "A metric of the `evaluate` package, reported before the task's: the path of a script, or a name "
            "on the Hub. Its code runs."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new head where the checkpoint's has another number of labels."}
    )
    demo_file: str | None = field(
        default=None, metadata={"help": "The demo's source distribution, downloaded before."}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Longer inputs are cut to this many tokens, or to what the model takes."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many examples, drawn by seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on the first this many examples."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the whole job and returns the fields of `results.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((ScriptArguments, TrainingArguments, HapConfig), description=__doc__.splitlines()[0])
    command = _expand_file(command)
    parser.set_defaults(**defaults_for(command))
    script, args, hap_config = parser.parse_args_into_dataclasses(command)
    set_seed(args.seed)
    model_path = script.model_name_or_path or demo_model_path()
    refuse_to_replace(model_path, Path(args.output_dir))
    config = load_config(model_path)
    task = load_data(script, args).aligned_with(config, ignore_mismatched_sizes=script.ignore_mismatched_sizes)
    name_labels(config, task)
    with args.main_process_first(local=False, desc="looking for what an earlier run has finished"):
        stages = Stages(Path(args.output_dir), command)
    trainer = make_trainer(script, args, hap_config, task, config, stages)
    run = run_stages(trainer, stages)
    name = public_name(script.model_name_or_path) if script.model_name_or_path else DEMO_MODEL
    results = collect_results(trainer, run, make_inputs(trainer), task=task.name, model=name)
    save(trainer, run, results, script)
    if trainer.is_world_process_zero():
        stages.finish()
        print(results_table(results))
        folder = Path(args.output_dir)
        print(f"Saved to {folder}. Load it with `import hap_transformers` and plain from_pretrained('{folder}').")
    return results


def defaults_for(command: list[str]) -> dict[str, Any]:
    """Defaults of the flags: those for GLUE, and of the demo where the command names no data."""
    named = {word.partition("=")[0] for word in command} & {"--task_name", "--train_file"}
    return DEFAULTS if named else {**DEFAULTS, **DEMO_DEFAULTS}


def _expand_file(command: list[str]) -> list[str]:
    """The flags that a YAML or JSON file holds, if the command names one; else the command."""
    if len(command) != 1 or Path(command[0]).suffix not in (".json", ".yaml", ".yml"):
        return command
    try:
        values = yaml.safe_load(Path(command[0]).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"'{command[0]}' cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{command[0]}' has no flags; expected a name and a value a line, such as 'ratio: 0.5'.")
    given = {name: value for name, value in values.items() if value is not None}
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return [word for name, words in lists.items() for word in (f"--{name}", *map(str, words))]


def load_data(script: ScriptArguments, args: TrainingArguments) -> Task:
    """Loads the task that the flags name, cut to the number of examples that they ask for."""
    flags = (script.task_name, script.data_dir, script.train_file, script.validation_file, script.encoding)
    task = load_task(*flags) if any(flags) else load_demo_task(script.demo_file)
    train, validation = task.data["train"], task.data["validation"]
    if script.max_train_samples is not None:
        train = train.shuffle(seed=args.seed).select(range(min(script.max_train_samples, len(train))))
    if script.max_eval_samples is not None:
        validation = validation.select(range(min(script.max_eval_samples, len(validation))))
    for name, split in (("training", train), ("validation", validation)):
        if not len(split):
            raise ValueError(f"Task '{task.name}' has no {name} examples.")
    task.data = DatasetDict(train=train, validation=validation)
    if args.process_index == 0:
        kind = f"classes {', '.join(task.labels)}" if task.labels else "a regression"
        print(f"{task.name}: text of {' and '.join(task.texts)}, {kind}")
    return task


def refuse_to_replace(model_path: str, output: Path) -> None:
    """Refuses an output folder that holds a model of another origin: only an earlier run's may be replaced.

    Raises:
        ValueError: If it is the folder of the model, or holds one that this script did not write.
    """
    if not output.is_dir():
        return
    if Path(model_path).is_dir() and output.samefile(model_path):
        raise ValueError(f"--output_dir '{output}' is the folder of the model; choose another.")
    ours = any((output / name).exists() for name in ("results.json", "_unfinished_run"))
    if (output / "config.json").exists() and not ours:
        raise ValueError(f"--output_dir '{output}' holds a model that this script did not write; choose another.")


def load_config(model_path: str) -> PretrainedConfig:
    """Loads the model's config as it is.

    Raises:
        ValueError: If the model is pruned.
    """
    config = AutoConfig.from_pretrained(model_path)
    if recorded_structure(config) is not None:
        raise ValueError(
            f"'{model_path}' is pruned already, and this script begins with a dense model. To prune further, call "
            "HapTrainer.prune() in Python."
        )
    return config


def name_labels(config: PretrainedConfig, task: Task) -> None:
    """Puts the task's labels into the model's config."""
    config.num_labels, config.finetuning_task = task.num_labels, task.name
    labels = task.labels or ["LABEL_0"]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if not task.labels:
        config.problem_type = "regression"
    elif getattr(config, "problem_type", None) is not None:  # Such as that of a checkpoint for several labels a text.
        config.problem_type = "single_label_classification"


def load_model(folder: str | Path, config: PretrainedConfig, script: ScriptArguments) -> PreTrainedModel:
    """Loads the model to fine-tune, or the one that an earlier run has fine-tuned.

    Raises:
        ValueError: If its weights cannot be loaded.
    """
    flags = {"ignore_mismatched_sizes": True} if script.ignore_mismatched_sizes else {}
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, config=config, **flags)
    except OSError:  # They name the folder.
        raise
    except Exception as error:  # Readers of weights raise what they like.
        hint = "" if flags else " If its head has other sizes, pass --ignore_mismatched_sizes to make a new one."
        raise ValueError(f"'{folder}' cannot be loaded: {error}{hint}") from error


def make_trainer(
    script: ScriptArguments,
    args: TrainingArguments,
    hap_config: HapConfig,
    task: Task,
    config: PretrainedConfig,
    stages: Stages,
) -> HapTrainer:
    """Makes the trainer of the model to fine-tune, or of the one that an earlier run has fine-tuned."""
    model_path = config.name_or_path
    tokenizer = load_tokenizer(model_path)
    model = load_model(stages.dense if stages.fine_tuned else model_path, config, script)
    model.config.name_or_path = model_path  # Not the folder of an earlier run.
    set_padding(tokenizer, model)
    length, note = cut_note(model, tokenizer, script.max_seq_length, pair=len(task.texts) == 2)
    if note and args.process_index == 0:
        print(note)
    with args.main_process_first(local=False, desc="loading the metric"):
        metrics = task.metrics(script.metric)
    metrics.validate(task.data["validation"][:]["label"])
    data = task.tokenize(tokenizer, length)
    validate_tokens(data, tokenizer, model)
    return HapTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        processing_class=tokenizer,
        hap_config=hap_config,
    )


def make_inputs(trainer: HapTrainer) -> dict[str, torch.Tensor]:
    """Makes a batch of the first validation examples, on the model's device, without labels."""
    rows = trainer.eval_dataset.select(range(min(COST_EXAMPLES, len(trainer.eval_dataset))))
    batch = trainer.data_collator([{name: row[name] for name in row if name != "label"} for row in rows])
    return {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}


def save(trainer: HapTrainer, run: FinishedRun, results: dict[str, Any], script: ScriptArguments) -> None:
    """Saves the model, its card and the results, and uploads them if the flags ask for it."""
    trainer.save_model()
    trainer.results.update({name: results[name] for name in COSTS if name in results})
    about = {"finetuned_from": None if script.model_name_or_path else DEMO_MODEL}
    if script.task_name:  # Other data have no name on the Hub.
        task = results["task"]
        about.update(dataset=f"GLUE {task}", dataset_tags="nyu-mll/glue", dataset_args=task)
    if trainer.is_world_process_zero():
        save_results(Path(trainer.args.output_dir), results, run)
    trainer.create_model_card(**about)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**about)


def run() -> None:
    """Runs the job from the shell: an error is printed in one line."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"run_glue_hap.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    run()
