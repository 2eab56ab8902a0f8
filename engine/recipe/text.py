"""A recipe as text: YAML in and out."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from freemerge.errors import RecipeError

REMEDY = "docs/recipe.md describes every key."


def parse_value(text: str) -> Any:
    """A parameter's value as a recipe would have it after the colon.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r} is not a value a recipe could have: {error}") from error


def read_documents(source) -> tuple[str, list]:
    """What to call a recipe, and its YAML documents."""
    if isinstance(source, Mapping):
        return "recipe", [dict(source)]
    text = os.fspath(source)
    label = "recipe"
    if isinstance(source, os.PathLike) or not ("\n" in text or re.search(r":(\s|$)", text)):
        label = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"{label}: cannot read this recipe: {reason}") from error
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not YAML: {error}") from error
    return label, [document for document in documents if document is not None] or [None]


def to_text(content: dict[str, Any]) -> str:
    """YAML of plain data, what is empty left out."""
    return yaml.dump(without_empty(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def without_empty(content: dict) -> dict:
    return {key: value for key, value in content.items() if value not in (None, {}, [])}


class _Loader(yaml.SafeLoader):
    """YAML with two surprises less: a key given twice is an error, and 1e-5 is a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def _represent_list(dumper: _Dumper, items: list):
    flat = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(list, _represent_list)
