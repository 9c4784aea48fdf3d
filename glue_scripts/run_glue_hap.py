"""Fine-tunes, scores, prunes and recovers a text classifier, and saves the smaller model.

With no arguments it runs the embedded demo. A run that was killed continues by the same command. Other uses:

    python run_glue_hap.py --model_name_or_path google-bert/bert-base-uncased --task_name mrpc --output_dir out
    python run_glue_hap.py --model_name_or_path FOLDER --task_name sst2 --data_dir PARQUET_FOLDER --output_dir out
    python run_glue_hap.py --train_file train.csv --validation_file validation.csv --ratio 0.5 --output_dir out
    python run_glue_hap.py flags.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    TrainingArguments,
    set_seed,
)

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.components.releases import GROUPED_BY_LENGTH
from hap_transformers.data.demo import DEMO_MODEL, demo_model_path, load_demo_task
from hap_transformers.data.tasks import Task, load_task
from hap_transformers.data.tokenizers import cut_note, load_tokenizer, set_padding, validate_tokens
from hap_transformers.reporting.page import LOADER
from hap_transformers.reporting.results import public_name
from hap_transformers.training.main_job import (
    COMMON_DEFAULTS,
    finish_job,
    load_classifier,
    load_dense_config,
    name_labels,
    named_flags,
    read_flags,
    refuse_to_replace,
    run_from_shell,
)
from hap_transformers.training.stages import Stages


# Defaults for GLUE on a small machine, where they differ from those of TrainingArguments and HapConfig.
DEFAULTS = {
    **COMMON_DEFAULTS,
    **GROUPED_BY_LENGTH,  # Half of the padding is saved.
    "output_dir": "outputs/demo",
    "num_train_epochs": 2.0,
    "recovery_epochs": 1.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
# The demo shows the same with less training, and fewer examples to refit and tune layers on.
DEMO_DEFAULTS = {"num_train_epochs": 1.0, "recovery_epochs": 0.5, "refit_examples": 1024}


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
    command, script, args, hap_config = read_flags(ScriptArguments, defaults_for, __doc__.splitlines()[0], arguments)
    set_seed(args.seed)
    model_path = script.model_name_or_path or demo_model_path()
    refuse_to_replace(Path(args.output_dir), model_path)
    config = load_dense_config(model_path)
    task = load_data(script, args).aligned_with(config, ignore_mismatched_sizes=script.ignore_mismatched_sizes)
    name_labels(config, task.name, task.labels)
    with args.main_process_first(local=False, desc="looking for what an earlier run has finished"):
        stages = Stages(Path(args.output_dir), command)
    trainer = make_trainer(script, args, hap_config, task, config, stages)
    about: dict[str, Any] = {"finetuned_from": None if script.model_name_or_path else DEMO_MODEL}
    if script.task_name:  # Other data have no name on the Hub.
        about.update(dataset=f"GLUE {task.name}", dataset_tags="nyu-mll/glue", dataset_args=task.name)
    name = public_name(script.model_name_or_path) if script.model_name_or_path else DEMO_MODEL
    return finish_job(trainer, stages, task=task.name, model=name, loader=LOADER, **about)


def defaults_for(command: list[str]) -> dict[str, Any]:
    """Defaults of the flags: those for GLUE, and of the demo where the command names no data."""
    names_data = named_flags(command) & {"--task_name", "--train_file"}
    return DEFAULTS if names_data else {**DEFAULTS, **DEMO_DEFAULTS}


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
    folder = stages.dense if stages.fine_tuned else model_path
    trimmed = stages.fine_tuned and hap_config.trim_vocabulary
    tokenizer = load_tokenizer(str(folder) if trimmed else model_path)
    if trimmed:
        config = AutoConfig.from_pretrained(folder)
    model = load_classifier(AutoModelForSequenceClassification, folder, config, script.ignore_mismatched_sizes)
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


def run() -> None:
    """Runs the job from the shell."""
    run_from_shell(main, "run_glue_hap.py")


if __name__ == "__main__":
    run()
