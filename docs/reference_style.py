"""Lets the reference show docstrings in the style of Transformers: groups of parameters, and names in brackets."""

import re
from typing import Any

import griffe
from griffe import Docstring


GROUP = re.compile(r"^(?P<title>Parameters that [^\n]+):\n(?P<body>(?:(?: {4}[^\n]*)?\n)+)", re.MULTILINE)
PARAMETER = re.compile(r"^(\w+) (\([^\n]*?\)):", re.MULTILINE)
REFERENCE = re.compile(r"\[`((?:\w+\.)*(\w+))`\](?![(\[])")


class ReferenceStyle(griffe.Extension):
    """Rewrites docstrings for mkdocstrings, which reads the sections that Google's style knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with every object of the package."""
        if obj.docstring is not None:
            obj.docstring = Docstring(rewritten(obj.docstring.value), parent=obj, lineno=obj.docstring.lineno)


def rewritten(text: str) -> str:
    r"""A docstring whose groups of parameters are lists and whose names in brackets are links.

    >>> print(rewritten("Parameters that say how:\n    seed (`int`): Of [`random`].").strip())
    **Parameters that say how**
    <BLANKLINE>
    - `seed` (`int`): Of [`random`][hap_transformers.random].
    """
    text = GROUP.sub(_listed, text + "\n")
    return REFERENCE.sub(lambda match: f"[`{match[1]}`][hap_transformers.{match[2]}]", text)


def _listed(match: re.Match[str]) -> str:
    body = PARAMETER.sub(r"\n- `\1` \2:", re.sub(r"^ {4}", "", match["body"], flags=re.MULTILINE))
    return f"**{match['title']}**\n{body}"
