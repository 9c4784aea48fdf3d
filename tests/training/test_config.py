import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hap_transformers import HapConfig


def test_no_field_clashes_with_training_arguments():
    names = [{f.name for f in dataclasses.fields(c)} for c in (HapConfig, TrainingArguments)]
    assert not names[0] & names[1]


def test_fields_are_flags(tmp_path):
    parser = HfArgumentParser((TrainingArguments, HapConfig))
    flags = ["--output_dir", str(tmp_path), "--ratio", "0.25", "--method", "gradient", "--recovery_epochs", "1.5"]
    _, config = parser.parse_args_into_dataclasses(flags)
    assert config == HapConfig(ratio=0.25, method="gradient", recovery_epochs=1.5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("ratio", 1.0),
        ("ratio", -0.5),
        ("budget", "money"),
        ("method", "magic"),
        ("min_heads", -1),
        ("min_neurons", 1.0),
        ("neuron_multiple", 0),
        ("implant_ratio", 1.0),
        ("implant_init", "magic"),
        ("sequence_length", 0),
        ("ridge", -0.1),
        ("distillation", 1.5),
        ("distillation_temperature", 0.0),
        ("distillation_hidden", float("nan")),
        ("num_probes", 0),
        ("max_examples", 0),
        ("tolerance", 1.5),
        ("recovery_epochs", 0.0),
        ("recovery_learning_rate", -1.0),
    ],
)
def test_bad_values_are_named(field, value):
    unknown = field in ("budget", "method", "implant_init")
    with pytest.raises(ValueError, match=f"Unknown.*{value}" if unknown else field):
        HapConfig(**{field: value})


def test_the_papers_recipe_can_be_changed():
    recipe = HapConfig.paper(ratio=0.3, num_probes=3)
    assert (recipe.method, recipe.refit, recipe.ratio, recipe.num_probes) == ("hessian_trace", False, 0.3, 3)
