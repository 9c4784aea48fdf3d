"""Hooks. Fixtures are in `common_fixtures`, helpers in `tiny`, `trainers`, `script_inputs`, `zoo` and others."""

import gc
import os
import sys

import pytest


# Until all is collected: what is imported stays, and to look through it again and again takes seconds.
gc.disable()
MANY_MODULES, frozen = 20, {"modules": 0}
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # Workers share the cores, and so do the processes that tests start.


def pytest_configure(config):
    """The process that hands tests to workers runs none, and the workers need not wait for what it would import."""
    if IS_WORKER or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common_fixtures")


def pytest_collection_modifyitems(items):
    """Marks the tests of docs/reliability.md, which `make test-reliability` runs."""
    for item in items:
        if "reliability" in item.path.parts:
            item.add_marker(pytest.mark.reliability)


def freeze_what_is_imported():
    """Accelerate collects garbage in every `prune()`; what is imported by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
    frozen["modules"] = len(sys.modules)


def pytest_collection_finish(session):
    freeze_what_is_imported()
    gc.enable()


def pytest_runtest_logfinish():
    """Tests import more: TRL and Sentence Transformers alone double what there is to look through."""
    if len(sys.modules) > frozen["modules"] + MANY_MODULES:
        freeze_what_is_imported()
