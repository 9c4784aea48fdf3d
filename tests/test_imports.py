"""Importing the package costs little beside `Trainer`, and its modules import each other in one direction."""

import ast
import json
import subprocess
import sys

import pytest
from tiny import ROOT


PROGRAM = """
import json, sys
from transformers import Trainer
before = set(sys.modules)
import hap_transformers
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


@pytest.mark.reliability
def test_the_package_brings_no_library_that_trainer_does_not():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert set(json.loads(run.stdout.splitlines()[-1])) <= {"hap_transformers", "torch"}


def modules():
    """The package's modules by their dotted names."""
    found = {}
    for file in (ROOT / "hap_transformers").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_by(name, known):
    """The package's modules that a module imports, at its top or within functions."""
    file = known[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield f"{base}.{alias.name}"
                elif base in known:
                    yield base


def test_no_module_imports_itself_through_others():
    known = modules()
    imports = {name: sorted(set(imported_by(name, known)) - {name}) for name in known}
    assert "hap_transformers.components.groups" in imports["hap_transformers.components.heads"]
    finished, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        path.append(name)
        for other in imports[name]:
            visit(other)
        finished.add(path.pop())

    for name in sorted(known):
        visit(name)
