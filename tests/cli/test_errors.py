"""Messages of the command, which name its options and not settings of Python."""

import pytest

from hap_transformers.cli import errors
from hap_transformers.cli.app import options_by_name
from hap_transformers.cli.errors import in_options, warn


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Set uniform=False: it stays.", "Pass --no-uniform: it stays."),
        ("uniform=True needs layers, or set uniform=False.", "--uniform needs layers, or pass --no-uniform."),
        ("Set implant_ratio=0. Nothing was pruned.", "Pass --implant-ratio 0. Nothing was pruned."),
        ("Prune components=['heads', 'neurons'].", "Prune --components heads --components neurons."),
        ("Estimate it with components=['layers', ...].", "Estimate it with --components layers."),
        ("for example max_memory='4GB', so that", "for example --max-memory 4GB, so that"),
        ("Use method='gauss_newton_trace'.", "Use --method gauss_newton_trace."),
        ("`max_memory` is a number of bytes.", "--max-memory is a number of bytes."),
        ("`batches` is empty, and `ratio` is 2.", "`batches` is empty, and --ratio is 2."),
        # Settings that no command has, values that only Python makes, and flags without an opposite.
        ("Untie them first (tie_word_embeddings=False).", "Untie them first (tie_word_embeddings=False)."),
        ("Pass method=mine.", "Pass method=mine."),
        ("Set overwrite=False.", "Set overwrite=False."),
    ],
)
def test_settings_become_options(message, expected):
    assert in_options(message, options_by_name()) == expected


def test_warnings_name_options_too(capsys, monkeypatch):
    monkeypatch.setattr(errors, "OPTIONS", options_by_name())
    warn("It is no faster. Plan with budget='latency'.")
    assert capsys.readouterr().err == "hap: It is no faster. Plan with --budget latency.\n"
