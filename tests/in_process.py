"""Runs `python -m MODULE ...` in the process of the tests: it imports nothing anew, which takes seconds."""

import io
import logging
import runpy
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from tiny import ROOT


def run_here(command, *, cwd, **_):
    """Takes the place of `subprocess.run` in a module whose command is one of this repository."""
    assert command[:2] == [sys.executable, "-m"] and Path(cwd) == ROOT
    printed, logger = io.StringIO(), logging.getLogger("hap_transformers")
    level = logger.level  # A command may change it for its own process.
    try:
        with mock.patch.object(sys, "argv", command[2:]), redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # The tests have imported the module under its own name.
            runpy.run_module(command[2], run_name="__main__")
    finally:
        logger.setLevel(level)
    return CompletedProcess(command, 0, printed.getvalue())
