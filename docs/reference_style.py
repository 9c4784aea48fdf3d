"""Makes the reference show docstrings in the style of Transformers: groups of parameters, and names in brackets."""

import re
from typing import Any

import griffe
from griffe import Docstring


GROUP = re.compile(r"^(?P<title>Parameters that [^\n]+):\n(?P<body>(?:(?: {4}[^\n]*)?\n)+)", re.MULTILINE)
PARAMETER = re.compile(r"^(\w+) (\([^\n]*?\)):", re.MULTILINE)
# Types that a section repeats from the signature. The reference shows the signature, too.
ARGUMENT_TYPE = re.compile(r"^(    \w+(?:, \w+)*) \(`[^\n]*?\):(?= )", re.MULTILINE)
RETURN_TYPE = re.compile(r"^(Returns:\n    )`[^`\n]+`: ", re.MULTILINE)
REFERENCE = re.compile(r"\[`((?:\w+\.)*(\w+))`\](?![(\[])")


class ReferenceStyle(griffe.Extension):
    """Rewrites docstrings for mkdocstrings, which reads only the sections of Google's style."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object. The reference calls this for every object of the package."""
        if obj.docstring is not None:
            own = obj.docstring
            settings = {"parser": own.parser, "parser_options": own.parser_options}
            obj.docstring = Docstring(rewritten(own.value), parent=obj, lineno=own.lineno, **settings)


def rewritten(text: str) -> str:
    r"""Rewrites a docstring: omits types, turns groups of parameters into lists and names in brackets into links.

    >>> print(rewritten("Parameters that say how:\n    seed (`int`): Of [`random`].").strip())
    **Parameters that say how**
    <BLANKLINE>
    - `seed` (`int`): Of [`random`][hap_transformers.random].
    >>> print(rewritten("A.\n\nArgs:\n    seed (`int`): Of `random`.").splitlines()[-1])
        seed: Of `random`.
    """
    text = GROUP.sub(_listed, text + "\n")
    text = RETURN_TYPE.sub(r"\1", ARGUMENT_TYPE.sub(r"\1:", text))
    return REFERENCE.sub(lambda match: f"[`{match[1]}`][hap_transformers.{match[2]}]", text)


def _listed(match: re.Match[str]) -> str:
    body = PARAMETER.sub(r"\n- `\1` \2:", re.sub(r"^ {4}", "", match["body"], flags=re.MULTILINE))
    return f"**{match['title']}**\n{body}"
