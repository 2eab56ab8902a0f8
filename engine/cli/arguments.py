"""Parameters of a method on the command line."""

from typing import Any

import typer

from freemerge.errors import InputError

PARAMETER = typer.Option(
    [],
    "--parameter",
    "-p",
    metavar="KEY=VALUE",
    help="A parameter of the method, KEY.EXPERT=VALUE for one expert's.",
)


def parse_parameters(values: list[str]) -> dict[str, Any]:
    """KEY=VALUE with VALUE as in a recipe; KEY.EXPERT=VALUE are collected into {EXPERT: VALUE}.

    Raises:
        InputError: something else, or a key given twice.
    """
    from freemerge.recipe.text import parse_value

    parameters: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"-p {text}: write it as name=value")
        name, _, owner = key.strip().partition(".")
        place = parameters.setdefault(name, {}) if owner else parameters
        if not isinstance(place, dict) or (owner or name) in place:
            raise InputError(f"-p {text}: {key.strip()} is given twice")
        place[owner or name] = parse_value(value)
    return parameters
