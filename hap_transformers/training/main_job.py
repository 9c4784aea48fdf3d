"""What the scripts of the main jobs share: flags, the model to begin with, and the end with all files written."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from transformers import AutoConfig, HfArgumentParser, PretrainedConfig, PreTrainedModel, TrainingArguments

from ..components.structure import recorded_structure
from ..efficiency import bf16_is_fast
from ..reporting.card import COSTS
from ..reporting.results import collect_results, results_table, save_results
from .config import HapConfig
from .stages import Stages, run_stages
from .trainer import HapTrainer


# Defaults on a small machine, where they differ from those of TrainingArguments.
COMMON_DEFAULTS: dict[str, Any] = {
    "save_strategy": "no",
    "logging_steps": 0.05,  # Twenty points of the training curve.
    "report_to": ["none"],
    "dataloader_pin_memory": torch.cuda.is_available(),  # Without a GPU, asking for it only gives a warning.
    # Fast bf16 takes a third of the time of float32. On a CPU, Trainer takes bf16 only with `use_cpu`.
    "bf16": bf16_is_fast(),
    "use_cpu": bf16_is_fast() and not torch.cuda.is_available(),
}
# FLOPs and latency are those of so many validation examples: enough for matrix products to take most of the time.
COST_EXAMPLES = 32

Flags = TypeVar("Flags")


def read_flags(
    script: type[Flags],
    defaults_for: Callable[[list[str]], Mapping[str, Any]],
    description: str,
    arguments: list[str] | None = None,
) -> tuple[list[str], Flags, TrainingArguments, HapConfig]:
    """Reads the flags of a main job, from the shell or from a file that the command names.

    Args:
        script (`type`): The dataclass of the script's own flags.
        defaults_for (`Callable`): Returns, for the words of a command, the defaults of flags that differ from those
            of the dataclasses.
        description (`str`): What the script does, for `--help`.
        arguments (`list[str]`, *optional*): The command; by default that of the process.

    Returns:
        `tuple`: The words of the command, and the script's flags, training arguments and pruning settings.

    Raises:
        ValueError: If a flag is unknown or its value is wrong, or the file cannot be read.
    """
    parser = HfArgumentParser((script, TrainingArguments, HapConfig), description=description)  # type: ignore[arg-type]
    command = _expand_file(sys.argv[1:] if arguments is None else arguments)
    parser.set_defaults(**defaults_for(command))
    flags, args, hap_config = parser.parse_args_into_dataclasses(command)
    return command, flags, args, hap_config


def named_flags(command: Sequence[str]) -> set[str]:
    """The flags that a command names, such as `{"--ratio"}`."""
    return {word.partition("=")[0] for word in command if word.startswith("--")}


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


def refuse_to_replace(output: Path, *inputs: str | None) -> None:
    """Refuses an output folder that holds a model of another origin: only an earlier run's may be replaced.

    Args:
        output (`Path`): The output folder.
        inputs (`str`, *optional*): Hub name or folder of the model to begin with.

    Raises:
        ValueError: If it is the folder of the model, or holds one that no main job wrote.
    """
    if not output.is_dir():
        return
    if any(name is not None and Path(name).is_dir() and output.samefile(name) for name in inputs):
        raise ValueError(f"--output_dir '{output}' is the folder of the model; choose another.")
    ours = any((output / name).exists() for name in ("results.json", "_unfinished_run"))
    if (output / "config.json").exists() and not ours:
        raise ValueError(f"--output_dir '{output}' holds a model that this script did not write; choose another.")


def load_dense_config(model_path: str) -> PretrainedConfig:
    """Loads the config of the model to begin with, as it is.

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


def name_labels(config: PretrainedConfig, task: str, labels: Sequence[str] | None) -> None:
    """Puts a task's classes into a model's config.

    Args:
        config (`PretrainedConfig`): The config.
        task (`str`): Name of the task.
        labels (`Sequence[str]`, *optional*): Names of the classes; `None` for regression.
    """
    names = labels or ["LABEL_0"]
    config.num_labels, config.finetuning_task = len(names), task
    config.id2label = dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    if not labels:
        config.problem_type = "regression"
    elif getattr(config, "problem_type", None) is not None:  # Such as that of a checkpoint for several labels a text.
        config.problem_type = "single_label_classification"


def load_classifier(
    auto_class: Any, folder: str | Path, config: PretrainedConfig, ignore_mismatched_sizes: bool = False
) -> PreTrainedModel:
    """Loads the model to begin with, or the one that an earlier run has fine-tuned.

    Args:
        auto_class (`type`): The `Auto` class of the task.
        folder (`str` or `Path`): Hub name or folder.
        config (`PretrainedConfig`): Its config with the labels of the task.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether a head of another size is made anew.

    Raises:
        ValueError: If its weights cannot be loaded.
    """
    flags = {"ignore_mismatched_sizes": True} if ignore_mismatched_sizes else {}
    try:
        return auto_class.from_pretrained(folder, config=config, **flags)
    except OSError:  # They name the folder.
        raise
    except Exception as error:  # Readers of weights raise what they like.
        hint = "" if flags else " If its head has other sizes, pass --ignore_mismatched_sizes to make a new one."
        raise ValueError(f"'{folder}' cannot be loaded: {error}{hint}") from error


def first_inputs(trainer: HapTrainer, count: int = COST_EXAMPLES) -> dict[str, torch.Tensor]:
    """Makes a batch of the first validation examples, on the model's device, without labels."""
    examples: Any = trainer.eval_dataset
    batch = trainer.data_collator([examples[i] for i in range(min(count, len(examples)))])
    return {name: tensor.to(trainer.model.device) for name, tensor in batch.items() if name != "labels"}  # type: ignore[union-attr]


def finish_job(
    trainer: HapTrainer,
    stages: Stages,
    *,
    task: str,
    model: str,
    loader: str,
    cost_examples: int = COST_EXAMPLES,
    more_costs: Callable[[dict[str, PreTrainedModel]], dict[str, Any]] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Runs all stages, writes the model, its card and the results, and uploads them if the flags ask for it.

    Args:
        trainer (`HapTrainer`): The trainer of the model to begin with.
        stages (`Stages`): What an earlier run has finished.
        task (`str`): Name of the task.
        model (`str`): Public name of the model to begin with.
        loader (`str`): The class that loads the model, with its package.
        cost_examples (`int`, *optional*, defaults to 32): FLOPs and latency are those of so many validation examples.
        more_costs (`Callable`, *optional*): Takes the dense and the pruned model by name, returns further costs of
            both, by names in [`COSTS`][hap_transformers.reporting.wording.COSTS].
        about: Arguments of `HapTrainer.create_model_card`.

    Returns:
        `dict[str, Any]`: The fields of `results.json`.
    """
    run = run_stages(trainer, stages)
    trainer.save_model()  # Before anything else that can fail.
    inputs = first_inputs(trainer, cost_examples)
    results = collect_results(trainer, run, inputs, task=task, model=model, loader=loader)
    if more_costs is not None:
        results.update(more_costs({"dense": run.dense, "pruned": cast(PreTrainedModel, trainer.model)}))
    trainer.results.update({name: results[name] for name in (*COSTS, "parts") if name in results})
    folder = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        save_results(folder, results, run)
    trainer.create_model_card(**about)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**about)
    if trainer.is_world_process_zero():
        stages.finish()
        print(results_table(results))
        print(f"Saved to {folder}. Load it with `import hap_transformers` and {loader}.from_pretrained('{folder}').")
    return results


def run_from_shell(main: Callable[[], Any], name: str) -> None:
    """Runs a main job from the shell: an error is printed in one line, after the script's name."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"{name}: {' '.join(str(error).split())}")
