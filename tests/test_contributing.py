"""The rules of CONTRIBUTING.md that can be checked."""

import ast
import functools
import re
import sys

import pytest
from convnets import CONVNETS
from decoders import DECODERS
from tiny import ROOT
from towers import TOWERS
from zoo import ZOO

from hap_transformers.checkpoints.remote_code import MODULES as MODULES_OF_EXPORTED_CODE
from hap_transformers.checkpoints.remote_code import SHIPPED


pytestmark = pytest.mark.any_release
PACKAGE, TESTS = ROOT / "hap_transformers", ROOT / "tests"
SCRIPTS = ROOT / "glue_scripts", ROOT / "vision_scripts", ROOT / "language_scripts"
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = sorted(file for folder in (PACKAGE, TESTS, *SCRIPTS) for file in folder.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
# Test folders without a counterpart in the package.
OTHER_TESTS = {"reliability", "fixtures", "glue_scripts", "language_scripts", "vision_scripts", "benchmarks"}


def name_of(file):
    return str(file.relative_to(ROOT))


def text_of(file):
    return file.read_text(encoding="utf-8")


@functools.cache
def tree_of(file):
    return ast.parse(text_of(file))


def test_paths_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {path for path in re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.(?:py|md|toml))`", text)}
    named = {path for path in named if not path.startswith(("../", ".venv"))}
    assert len(named) > 3
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("file", sorted((PACKAGE / "components").glob("*.py")), ids=name_of)
def test_components_import_nothing_above_them(file):
    allowed = {"torch", "transformers", "packaging", *sys.stdlib_module_names}
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 if node.level else node.module.split(".")[0] in allowed, ast.unparse(node)


def test_exported_code_has_every_file_of_components():
    assert {*MODULES_OF_EXPORTED_CODE, "__init__"} == {file.stem for file in (PACKAGE / "components").glob("*.py")}


def test_every_architecture_is_in_the_zoo():
    models = (*ZOO.values(), *TOWERS.values(), *CONVNETS.values(), *DECODERS.values())
    assert {tiny.config().model_type for tiny in models} == SHIPPED.keys()


@pytest.mark.parametrize("folder, function", [("sensitivity", "register_method"), ("components", "register_kind")])
def test_what_registers_itself_is_imported_with_its_folder(folder, function):
    registering = {
        file.stem
        for file in (PACKAGE / folder).glob("*.py")
        for node in tree_of(file).body
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith(f"{function}(")
    }
    imported = {
        alias.name
        for node in tree_of(PACKAGE / folder / "__init__.py").body
        if isinstance(node, ast.ImportFrom) and not node.module
        for alias in node.names
    }
    assert registering == imported and len(registering) > 1


def test_files_are_short():
    lengths = {name_of(file): len(text_of(file).splitlines()) for file in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES} and len(lengths) > 100


def lines_of(function):
    """Lines of a function from `def` to its end, without its docstring."""
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_functions_are_short():
    lengths = {
        (name_of(file), node.name): lines_of(node)
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} and lengths


def test_no_module_asks_what_kind_a_block_is():
    assert not [name_of(file) for file in MODULES if re.search(r"isinstance\([^()]*Block\b", text_of(file))]


def test_planning_knows_no_method_by_name():
    for file in (PACKAGE / "planning").glob("*.py"):
        strings = {node.value for node in ast.walk(tree_of(file)) if isinstance(node, ast.Constant)}
        assert "kronecker" not in strings, file


def folders(root):
    return {folder.name for folder in root.iterdir() if folder.is_dir() and list(folder.glob("*.py"))}


def test_the_tests_mirror_the_package():
    assert folders(TESTS) - OTHER_TESTS == folders(PACKAGE)
    for folder in folders(PACKAGE):
        assert list((TESTS / folder).glob("test_*.py")), folder


def test_names_of_test_files_are_unique():
    """Pytest imports test files by their names alone."""
    names = [file.name for file in TESTS.rglob("*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
