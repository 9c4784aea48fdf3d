"""Messages of the library in the words of the command line."""

import ast
import re
from collections.abc import Mapping

import typer
from typer.core import TyperOption


# The options of all commands by name; the app, which is made of the commands, adds them when it runs.
OPTIONS: dict[str, TyperOption] = {}
SETTING = re.compile(r"(?:\b(?P<verb>[Ss]et) )?\b(?P<name>[a-z_]+)=(?P<value>\[[^][]*\]|'[^']*'|[\w.]*\w)")
NAME = re.compile(r"`([a-z_]+)`")


def in_options(message: str, options: Mapping[str, TyperOption]) -> str:
    """A message whose settings of Python, such as `uniform=False` or `ratio`, are options, such as `--no-uniform`.

    Args:
        message (`str`): A message that names settings.
        options (`Mapping`): The options by name. A setting of another name is left as it is.
    """
    message = SETTING.sub(lambda setting: _as_option(setting, options), message)
    return NAME.sub(lambda found: options[found[1]].opts[0] if found[1] in options else found[0], message)


def warn(message: str) -> None:
    """Prints a warning of the library in the words of the command line."""
    typer.echo(f"hap: {in_options(message, OPTIONS)}", err=True)


def _as_option(setting: re.Match[str], options: Mapping[str, TyperOption]) -> str:
    option = options.get(setting["name"])
    if option is None:
        return setting[0]
    try:
        value = ast.literal_eval(setting["value"])
    except (SyntaxError, ValueError):  # A name, such as that of a variable.
        return setting[0]
    verb = {"Set": "Pass ", "set": "pass "}.get(setting["verb"] or "", "")
    if isinstance(value, bool):
        flags = option.opts if value else option.secondary_opts
        return verb + flags[0] if flags else setting[0]
    values = [each for each in value if each is not ...] if isinstance(value, list) else [value]
    return verb + " ".join(f"{option.opts[0]} {each}" for each in values)
