import dataclasses
import re

import numpy as np
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


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("neuron_multiple", 16.0, 16),
        ("refit_examples", 64.0, 64),
        ("tuning_epochs", np.int64(2), 2),
        ("recovery_learning_rate", "1e-4", 1e-4),  # YAML reads a word.
        ("ratio", np.float32(0.5), 0.5),
        ("min_neurons", 0, 0),
        ("ridge", None, None),
    ],
)
def test_numbers_get_the_types_of_their_fields(field, given, expected):
    found = getattr(HapConfig(**{field: given}), field)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("neuron_multiple", 8.5, "a whole number"),
        ("max_examples", "64", "a whole number"),
        ("min_heads", 1.5, "a whole number"),
        ("sequence_length", 12.5, "a whole number"),
        ("tuning_epochs", True, "a whole number"),
        ("num_probes", None, "a whole number"),
        ("refit_examples", float("inf"), "a whole number"),
        ("ratio", "half", "a number"),
        ("distillation", [0.5], "a number"),
    ],
)
def test_what_is_no_such_number_is_named(field, value, what):
    with pytest.raises(ValueError, match=re.escape(f"`{field}` must be {what}, got {value!r}.")):
        HapConfig(**{field: value})


def test_a_rate_of_a_yaml_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("ratio: 0.5\nrecovery_learning_rate: 1e-4\n")
    (config,) = HfArgumentParser(HapConfig).parse_yaml_file(str(file))
    assert config.recovery_learning_rate == 1e-4


def test_the_papers_recipe_can_be_changed():
    recipe = HapConfig.paper(ratio=0.3, num_probes=3)
    assert (recipe.method, recipe.refit, recipe.ratio, recipe.num_probes) == ("hessian_trace", False, 0.3, 3)
