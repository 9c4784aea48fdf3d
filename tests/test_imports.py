"""Importing the package costs little beside `Trainer`: heavy libraries wait until they are needed."""

import json
import subprocess
import sys

import pytest


PROGRAM = """
import json, sys
from transformers import Trainer
before = set(sys.modules)
import hap_transformers
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


@pytest.mark.any_release
def test_the_package_brings_no_library_that_trainer_does_not():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert set(json.loads(run.stdout.splitlines()[-1])) <= {"hap_transformers", "torch"}
