"""What the documentation refers to is there."""

import re

import pytest
from conftest import ROOT


def test_the_promises_name_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:\.\./)?[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, function in named:
        path = (ROOT / "tests" / "reliability" / file).resolve()
        assert path.is_file(), file
        assert not function or f"def {function}(" in path.read_text(), function


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "docs/reliability.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
