"""Recipes of several YAML documents: stages of a merge, brought into the order they can run in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from freemerge.errors import RecipeError, listed
from freemerge.recipe import Recipe, recipe_of
from freemerge.recipe.names import NAME
from freemerge.recipe.text import REMEDY, read_documents
from freemerge.schema import parse


@dataclass(frozen=True)
class Stage:
    """One document of a recipe of several; others name its result by `name`."""

    name: str | None
    recipe: Recipe


def load_stages(source: str | os.PathLike) -> tuple[Stage, ...]:
    """Read a recipe of one or several documents: its stages in the order they can run, the last makes the result.

    Raises:
        RecipeError: as for `load_recipe`; or the stages make no one result.
    """
    return _arranged(*read_documents(source))


def stages_yaml(stages: Sequence[Stage]) -> str:
    """A recipe of several documents; loading it gives these stages again."""
    heads = ({"name": stage.name} if stage.name else {} for stage in stages)
    texts = (yaml.safe_dump(head) if head else "" for head in heads)
    return "---\n".join(text + stage.recipe.to_yaml() for text, stage in zip(texts, stages, strict=True))


def _stages(label: str, documents: list) -> list[Stage]:
    stages, problems = [], []
    for number, content in enumerate(documents, 1):
        document, found = parse(content)
        if document:
            stages.append(Stage(document.name, recipe_of(document, found)))
        problems += [f"document {number}: {problem}" if len(documents) > 1 else problem for problem in found]
    if problems:
        raise RecipeError(f"{label}: {listed(problems, REMEDY)}")
    return stages


def _arranged(label: str, documents: list) -> tuple[Stage, ...]:
    stages = _stages(label, documents)
    unnamed = [stage for stage in stages if stage.name is None]
    final = unnamed[0] if unnamed else stages[-1]
    made = {stage.name: stage for stage in stages if stage.name is not None}
    problems = [
        f"name {name!r}: it becomes a folder's name: letters, digits, '_', '-', and '.' not first"
        for name in made
        if not NAME.fullmatch(name)
    ]
    if len(unnamed) > 1:
        problems.append("more than one document has no name; the one without is the result")
    problems += [f"name {name!r}: given to two documents" for name, count in _counted(stages) if count > 1]
    ordered: list[Stage] = []
    _visit(final, made, ordered, (), problems)
    unused = [stage.name for stage in stages if stage not in ordered and stage.name is not None]
    if not problems:
        problems += [f"{name}: no document has it among its models; out is one model" for name in unused]
    if problems:
        raise RecipeError(f"{label}: {listed(problems, REMEDY)}")
    return tuple(ordered)


def _counted(stages: list[Stage]) -> list[tuple[str, int]]:
    names = [stage.name.lower() for stage in stages if stage.name is not None]
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _visit(
    stage: Stage, made: dict[str, Stage], ordered: list[Stage], above: tuple[str | None, ...], problems: list[str]
):
    """Put a stage into `ordered`, after those that make its models."""
    if stage.name is not None and stage.name in above:
        problems.append(f"{stage.name}: made from itself, by {' <- '.join(map(str, above[above.index(stage.name) :]))}")
        return
    for model in stage.recipe.models:
        if model in made and made[model] not in ordered:
            _visit(made[model], made, ordered, (*above, stage.name), problems)
    if stage not in ordered:
        ordered.append(stage)
