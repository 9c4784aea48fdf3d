"""Scores, prunes, refits and recovers a causal language model on plain text, and saves the smaller model.

With no arguments a tiny Llama learns the documentation. A run that was killed continues by the same command. Other
uses:

    python language_scripts/run_clm_hap.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file text.txt \
        --validation_file other.txt --ratio 0.2 --output_dir out
    python language_scripts/run_clm_hap.py --model_name_or_path model.gguf --train_file text.txt \
        --components query_key_dims value_dims neurons --recovery_epochs 1 --output_dir out
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import (
    DefaultDataCollator,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)


if __name__ == "__main__":  # Python finds imports beside a script, not in the folder above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.data.tokenizers import set_padding, validate_tokens
from hap_transformers.reporting.results import public_name
from hap_transformers.training.main_job import (
    COMMON_DEFAULTS,
    finish_job,
    named_flags,
    read_flags,
    refuse_to_replace,
    run_from_shell,
)
from hap_transformers.training.stages import Stages
from language_scripts.causal_models import DTYPES, load_causal_tokenizer, load_config, load_model
from language_scripts.demo_model import demo_model, demo_text, demo_tokenizer
from language_scripts.generation import tokens_per_second
from language_scripts.perplexity import Perplexity, block_losses
from language_scripts.text_blocks import load_blocks, read_text, validate_blocks


# Defaults for language models, where they differ from those of TrainingArguments and HapConfig. A model is taken as it
# is, and follows the dense one where it recovers.
DEFAULTS = {
    **COMMON_DEFAULTS,
    "output_dir": "outputs/clm",
    "num_train_epochs": 0.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_examples": 128,
    "refit_examples": 512,
    "distillation": 1.0,
    "ratio": 0.2,
}
# The tiny Llama learns first.
DEMO_DEFAULTS = {
    "output_dir": "outputs/clm_demo",
    "num_train_epochs": 4.0,
    "recovery_epochs": 0.5,
    "learning_rate": 3e-3,
    "recovery_learning_rate": 3e-4,
    "per_device_train_batch_size": 8,
    "block_size": 128,
    "bf16": False,
    "ratio": 0.7,
}
LOADER = "transformers.AutoModelForCausalLM"
DEMO = "tiny Llama"
# FLOPs and latency are those of so many blocks; every token has logits of the whole vocabulary.
COST_EXAMPLES = 4


@dataclass
class ScriptArguments:
    """Which model and which texts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name, folder or .gguf file of a causal language model."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the tokenizer, where it is not the model's."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    train_file: str | None = field(
        default=None, metadata={"help": "Plain text to score, refit and recover on; by default the documentation."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Plain text to validate on; by default the last tenth of the other."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of the files, such as latin-1; by default UTF-8."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens of a block, at most what the model takes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many blocks, drawn by seed."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate on this many blocks, drawn by seed."}
    )

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'.")
        if self.block_size < 2:
            raise ValueError(f"--block_size must be at least 2, got {self.block_size}.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file, the text to score and refit on.")
        for flag in ("max_train_samples", "max_eval_samples"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, flag)}.")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the whole job and returns the fields of `results.json`."""
    command, script, args, hap_config = read_flags(ScriptArguments, defaults_for, __doc__.splitlines()[0], arguments)
    set_seed(args.seed)
    refuse_to_replace(Path(args.output_dir), script.model_name_or_path)
    texts = load_texts(script)
    config = load_config(script.model_name_or_path) if script.model_name_or_path else None
    tokenizer = make_tokenizer(script, texts[0])
    data = load_data(script, args, config, tokenizer, texts)
    with args.main_process_first(local=False, desc="looking for what an earlier run has finished"):
        stages = Stages(Path(args.output_dir), command)
    model = make_model(script, config, stages.dense if stages.fine_tuned else None)
    trainer = make_trainer(args, hap_config, model, tokenizer, data)
    name = public_name(script.model_name_or_path) if script.model_name_or_path else DEMO
    task = Path(script.train_file).stem if script.train_file else "documentation"
    ids = torch.tensor(data["validation"][:1]["input_ids"])
    return finish_job(
        trainer,
        stages,
        task=task,
        model=name.removesuffix(".gguf"),
        loader=LOADER,
        cost_examples=COST_EXAMPLES,
        more_costs=lambda models: {"tokens_per_second": tokens_per_second(models, ids)},
    )


def defaults_for(command: list[str]) -> dict[str, Any]:
    """Defaults of the flags: those of any model, or of the tiny Llama where the command names none."""
    return DEFAULTS if "--model_name_or_path" in named_flags(command) else {**DEFAULTS, **DEMO_DEFAULTS}


def load_texts(script: ScriptArguments) -> tuple[str, str | None]:
    """Reads the text to score and train on, and that to validate on if there is one."""
    if script.train_file is None:
        return demo_text(), None
    held_out = script.validation_file
    return read_text(script.train_file, script.encoding), held_out and read_text(held_out, script.encoding)


def make_tokenizer(script: ScriptArguments, text: str) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer, or trains the demo's."""
    name = script.tokenizer_name or script.model_name_or_path
    return load_causal_tokenizer(name) if name else demo_tokenizer(text)


def load_data(
    script: ScriptArguments,
    args: TrainingArguments,
    config: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str | None],
) -> DatasetDict:
    """Cuts the texts into blocks, and draws as many as the flags ask for.

    Raises:
        ValueError: If a text is shorter than a block, or the model takes no blocks of this length.
    """
    name, length = script.model_name_or_path, script.block_size
    limit = getattr(config, "max_position_embeddings", None) or length
    if length > limit:
        raise ValueError(f"--block_size is {length}, and '{name}' takes {limit} tokens.")
    names = (f"'{script.train_file or 'the documentation'}'", f"'{script.validation_file}'")
    data = load_blocks(texts, names, tokenizer, length)
    limits = {"train": script.max_train_samples, "validation": script.max_eval_samples}
    for split, most in limits.items():
        if most is not None and most < len(data[split]):
            data[split] = data[split].shuffle(seed=args.seed).select(range(most))
    if args.process_index == 0:
        counts = f"{len(data['train']):,} to score and train on, {len(data['validation']):,} to validate on"
        print(f"Blocks of {length} tokens: {counts}")
    return data


def make_model(script: ScriptArguments, config: PretrainedConfig | None, finished: Path | None) -> PreTrainedModel:
    """Loads the model to begin with or the one that an earlier run has trained, or makes the demo's."""
    name = script.model_name_or_path
    if finished is not None:
        model = load_model(str(finished), load_config(str(finished)), script.dtype)
        model.config.name_or_path = name or ""  # Not the folder of an earlier run.
        return model
    return load_model(name, config, script.dtype) if name and config else demo_model(script.block_size)


def make_trainer(
    args: TrainingArguments,
    hap_config: HapConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
) -> HapTrainer:
    """Makes the trainer, after the model was tried on the validation text.

    Raises:
        ValueError: If the tokenizer is another model's, or the model's loss is not finite.
    """
    set_padding(tokenizer, model)
    validate_tokens(data, tokenizer, model)
    if not (args.num_train_epochs or args.max_steps > 0):
        validate_blocks(model.to(args.device), data["validation"])
    return HapTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DefaultDataCollator(),
        compute_metrics=Perplexity(),
        preprocess_logits_for_metrics=block_losses,
        processing_class=tokenizer,
        hap_config=hap_config,
    )


def run() -> None:
    """Runs the job from the shell."""
    run_from_shell(main, "run_clm_hap.py")


if __name__ == "__main__":
    run()
