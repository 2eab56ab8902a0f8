"""Modules: parts of a model, each merged from models or slices of its own, together one plan.

Nothing is known of any architecture: a module's name is what the names of its tensors begin with, and one module may
have what all others leave, whatever it is called.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from freemerge.checkpoint.view import CheckpointView
from freemerge.errors import InputError, PlanError, gathered, listed
from freemerge.methods import Method
from freemerge.plan import REMEDY, Plan, lay_out, make_plan
from freemerge.recipe import Module, Recipe
from freemerge.settings import insist_on
from freemerge.slices import PlanInParts, plan_slices
from freemerge.vocabulary import Vocabulary


def plan_modules(
    recipe: Recipe,
    method: Method,
    base,
    experts: Sequence,
    *,
    shard_size: int | None,
    vocabulary: Vocabulary | None = None,
) -> PlanInParts:
    """The plan of a recipe with modules; arguments as for `plan_slices`.

    Raises:
        RecipeError: recipe and method do not agree.
        PlanError: models do not have these modules, or do not fit together; with every problem found.
    """
    insist_on(recipe, method)
    models = {expert.model: checkpoint for expert, checkpoint in zip(recipe.experts, experts, strict=True)}
    models[recipe.models[0]] = base
    names = _Names([module.name for module in recipe.modules], base.tensors)
    if names.problems:
        raise PlanError(listed(names.problems, REMEDY))
    parts, tasks, warnings, errors, config = {}, [], [], [], base.config
    for module in recipe.modules:
        try:
            part = _plan_module(module, method, models, names, config, vocabulary)
        except InputError as error:
            errors.append(error)
            continue
        parts |= dict.fromkeys((task.name for task in part.tasks), part)
        tasks += part.tasks
        warnings += [f"modules.{module.name}: {warning}" for warning in part.warnings]
        config = part.base.config if part.base.config is not None else config
    if errors:
        raise PlanError(gathered(errors))
    whole = CheckpointView(base, {name: (part.base, name) for name, part in parts.items()}, config)
    shards = lay_out(tasks, shard_size)
    return PlanInParts(
        recipe, method, whole, list(experts), tasks, shards, warnings, vocabulary=vocabulary, parts=parts
    )


class _Names:
    """Which module a tensor is in."""

    def __init__(self, modules: list[str], tensors: Iterable[str]):
        self._prefixes = [name for name in modules if any(_begins(tensor, name) for tensor in tensors)]
        others = [name for name in modules if name not in self._prefixes]
        self._rest = others[0] if others else None
        left = [tensor for tensor in tensors if self.module_of(tensor) is None]
        begin = ", ".join(sorted({tensor.partition(".")[0] for tensor in tensors}))
        self.problems = []
        if len(others) > 1:
            self.problems.append(
                f"modules: no tensor's name begins with {' or '.join(others)}, and only one module may have what the "
                f"others leave; names begin with {begin}"
            )
        elif left:
            some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            self.problems.append(f"modules: none has {some}; add one, `default` has what the others leave")
        empty = self._rest is not None and not any(self.module_of(tensor) == self._rest for tensor in tensors)
        if empty and not self.problems:
            self.problems.append(f"modules.{self._rest}: no tensor's name begins so; names begin with {begin}")

    def module_of(self, tensor: str) -> str | None:
        found = [name for name in self._prefixes if _begins(tensor, name)]
        return max(found, key=len, default=self._rest)


def _begins(tensor: str, module: str) -> bool:
    return tensor.startswith(f"{module.rstrip('.')}.")


def _plan_module(
    module: Module,
    method: Method,
    models: Mapping[str, Any],
    names: _Names,
    config: dict | None,
    vocabulary: Vocabulary | None,
) -> Plan:
    def view(checkpoint, config: dict | None = None) -> CheckpointView:
        inside = [name for name in checkpoint.tensors if names.module_of(name) == module.name]
        return CheckpointView(checkpoint, {name: (checkpoint, name) for name in inside}, config)

    recipe = module.recipe
    lay = plan_slices if recipe.slices else make_plan
    experts = {model: view(models[model]) for model in recipe.models}
    experts[recipe.models[0]] = view(models[recipe.models[0]], config)
    opened = [experts[expert.model] for expert in recipe.experts]
    return lay(recipe, method, experts[recipe.models[0]], opened, shard_size=None, vocabulary=vocabulary)
