"""Hooks. Fixtures are in `common_fixtures`, helpers in `tiny`, `trainers`, `script_inputs`, `zoo` and others."""

import gc
import os

import pytest


# Until all is collected: what is imported stays, and to look through it again and again takes seconds.
gc.disable()
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


def pytest_collection_finish(session):
    """Accelerate collects garbage in every `prune()`; what is imported by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
    gc.enable()
