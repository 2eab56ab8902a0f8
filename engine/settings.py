"""What a recipe's parameters come to: checked against its method, resolved for each tensor.

Precedence, as in mergekit: an expert's own value, the recipe's for all, the variant's preset, the method's default. A
list of {filter, value} without a matching filter says nothing, so the next in line answers.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from freemerge.errors import RecipeError, listed
from freemerge.recipe import Recipe
from freemerge.schema import nearest

# mergekit's options about how it computes, not what: freemerge has nothing to choose there
IGNORED = {"int8_mask"}
# what mergekit takes as well, for it is the same code as ties there, and makes nothing of
WITHOUT_EFFECT = {"task_arithmetic": {"density", "rescale"}}

_NO_EXPERT = "models: there is no expert to merge (base_model itself is not one)"
_SILENT = object()  # a list of filters of which none matches


def settings(recipe: Recipe, method, tensor_name: str, position: float | None = None) -> dict[str, Any]:
    """The parameters of `method` for one tensor, as its `merge_tensor` takes them.

    Args:
        recipe: one that `check_recipe` has no problem with.
        tensor_name: what filters look at.
        position: 0 (first layer) to 1 (last), from `layer_positions`; what gradients look at. None is 1.

    Returns:
        name -> value; a tuple of T numbers for a parameter each expert has its own of. Not to be changed: where no
        tensor has values of its own, all share this dict.
    """
    compiled = recipe._compiled.get(method.name)
    if compiled is None:
        compiled = recipe._compiled[method.name] = _Compiled(recipe, method)
    return compiled.resolve(tensor_name, 1.0 if position is None else position)


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where in its stack of layers a tensor stands: index / (layers - 1). As in mergekit an only layer
    is at 1, and what is outside the layers at 0.
    """
    names = list(names)
    sizes = layer_stacks(names)

    def position(place: tuple[str, int] | None) -> float:
        if place is None or place[0] not in sizes:
            return 0.0
        stack, index = place
        return index / (sizes[stack] - 1) if sizes[stack] > 1 else 1.0  # the only layer is the last

    return {name: position(layer_of(name)) for name in names}


def layer_stacks(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers in a model and how many each has.

    A stack is recognised by names: `model.layers.12.mlp.up_proj.weight` is in layer 12 of the stack `model.layers` when
    other names carry every number from 0 on in that place. A model may have several (encoder and decoder).
    """
    indices, sizes = defaultdict(set), defaultdict(int)
    for place in map(layer_of, names):
        if place is not None:
            indices[place[0]].add(place[1])
            sizes[place[0]] += 1
    # a classifier's 0, 1, 2 is not a stack of layers beside twelve transformer blocks
    floor = max(sizes.values(), default=0) / 10
    return {
        stack: len(found) for stack, found in indices.items() if len(found) == max(found) + 1 and sizes[stack] >= floor
    }


def layer_of(name: str) -> tuple[str, int] | None:
    """("model.layers", 12) of "model.layers.12.mlp.up_proj.weight"; None for a name without a number."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 1):
        if part.isdecimal() and part.isascii():
            return ".".join(parts[:i]), int(part)
    # "h.5.attn" has a prefix; "5.attn", of a bare nn.Sequential, has the empty one
    return ("", int(parts[0])) if parts[0].isdecimal() and parts[0].isascii() else None


def is_embedding(name: str) -> bool:
    return any("emb" in part or part in ("wte", "wpe") for part in name.lower().split("."))


def config_parts(config: dict | None) -> list[dict]:
    """The configuration itself and those in it that are of a language model."""
    parts = [config, *((config or {}).get(key) for key in ("text_config", "llm_config", "language_config"))]
    return [part for part in parts if isinstance(part, dict)]


def check_recipe(recipe: Recipe, method) -> list[str]:
    """Every problem of a recipe with its method, one sentence each; empty if there is none."""
    if recipe.slices:
        return _check_slices(recipe, method)
    if recipe.modules:
        return _check_modules(recipe, method)
    problems = _check_state(recipe, method)
    if method.uses_base and not method.base_optional and recipe.base is None:
        problems.append(f"base_model: {method.name} merges differences from a base; say which model that is")
    if method.merges_adapters and recipe.base is not None:
        problems.append(f"base_model: {method.name} merges adapters alone; apply the result, base+adapter")
    if not recipe.experts:
        problems.append(_NO_EXPERT)
    problems += _check_all("parameters", recipe.parameters, method, shared=True)
    for expert in recipe.experts:
        problems += _check_all(f"models, {expert.name}", expert.parameters, method, shared=False)
    return problems or _check_shares(recipe, method)


def _check_state(recipe: Recipe, method) -> list[str]:
    if method.keeps_state:
        return []
    keys = [key for key in ("continue_from", "keep_state") if getattr(recipe, key)]
    return [f"{key}: {method.name} merges all experts at once and keeps no state" for key in keys]


def _check_slices(recipe: Recipe, method) -> list[str]:
    problems = _check_state(recipe, method) + _check_all("parameters", recipe.parameters, method, shared=True)
    if method.leaves_experts(recipe.parameters) or method.merges_adapters or method.scope == "model":
        problems.append(f"slices: {method.name} looks at whole models; give them as models")
    for k, piece in enumerate(recipe.slices):
        # a slice of the base alone is its layers as they are
        known = [*problems, *([_NO_EXPERT] if piece.base_range else [])]
        found = [problem for problem in check_recipe(piece.recipe, method) if problem not in known]
        problems += [f"slices[{k}]: {problem}" for problem in found]
    return problems


def _check_modules(recipe: Recipe, method) -> list[str]:
    problems = _check_all("parameters", recipe.parameters, method, shared=True)
    if method.leaves_experts(recipe.parameters) or method.merges_adapters or method.scope == "model":
        problems.append(f"modules: {method.name} looks at whole models; give them as models")
    for module in recipe.modules:
        found = [problem for problem in check_recipe(module.recipe, method) if problem not in problems]
        problems += [f"modules.{module.name}: {problem}" for problem in found]
    return problems


def insist_on(recipe: Recipe, method) -> None:
    """Raise RecipeError with every problem that `check_recipe` finds."""
    problems = check_recipe(recipe, method)
    if problems:
        raise RecipeError(listed(problems, explained_by(method)))


def explained_by(method) -> str:
    """What to do about parameters that are not in order."""
    return f"`freemerge methods {method.name}` explains its parameters."


def _check_shares(recipe: Recipe, method) -> list[str]:
    try:
        _Compiled(recipe, method)
    except RecipeError as error:
        return [str(error)]
    return []


def _check_all(where: str, values: dict[str, Any], method, shared: bool) -> list[str]:
    problems = []
    for key, value in values.items():
        name = _known_as(key, method)
        if name is None:
            continue
        parameter = method.parameters.get(name)
        if name == "variant" and method.variants:
            problems += _check_variant(where, value, method, shared)
        elif parameter is None:
            problems.append(f"{where}: {method.name} has no parameter {key!r}{nearest(key, _names(method))}")
        elif not shared and not parameter.per_expert:
            problems.append(f"{where}: {key} is one for all experts; write it in the recipe's own parameters")
        else:
            problems += [f"{where}: {key}: {problem}" for problem in _check_setting(value, parameter)]
    doubled = [(key, name) for key, name in method.aliases.items() if key in values and name in values]
    return problems + [f"{where}: {key} and {name} are the same parameter; keep one" for key, name in doubled]


def _check_variant(where: str, value: Any, method, shared: bool) -> list[str]:
    if not shared:
        return [f"{where}: variant is one for all experts; write it in the recipe's own parameters"]
    if not isinstance(value, str) or value not in method.variants:
        return [f"{where}: variant: {value!r} is none of {method.name}{nearest(value, method.variants)}"]
    return []


def _check_setting(value: Any, parameter) -> list[str]:
    if _is_filtered(value):
        return [problem for item in value for problem in _check_setting(item["value"], parameter)]
    items = value if isinstance(value, list) and parameter.kind != "patterns" else [value]
    problems = [] if items else [f"an empty list is not {_expected(parameter)}"]
    for item in items:
        try:
            _converter(parameter)(item)
        except (ValueError, TypeError, re.error):
            problems.append(f"{item!r} is not {_expected(parameter)}")
    return problems


def _names(method) -> set[str]:
    return {*method.parameters, *method.aliases, *(["variant"] if method.variants else [])}


def _known_as(key: str, method) -> str | None:
    """The method's word for a key of the recipe; None for one that does not matter here."""
    if key in IGNORED | WITHOUT_EFFECT.get(method.name, set()) and key not in method.parameters:
        return None
    return method.aliases.get(key, key)


class _Compiled:
    """A recipe's parameters in the order of precedence, with everything evaluated that no tensor can change."""

    def __init__(self, recipe: Recipe, method):
        shared = _by_known_name(recipe.parameters, method)
        preset = method.variants.get(shared.get("variant"), {})
        experts = [_by_known_name(expert.parameters, method) for expert in recipe.experts]
        self._names = [expert.name for expert in recipe.experts]
        self._constant: dict[str, Any] = {}
        self._varying: dict[str, tuple[Any, list[list]]] = {}
        for name, parameter in method.parameters.items():
            last = preset.get(name, parameter.default)
            owners = experts if parameter.per_expert else [{}]
            chains = [
                [*(_prepare(values[name], parameter) for values in (own, shared) if name in values), last]
                for own in owners
            ]
            if any(callable(chain[0]) for chain in chains):
                self._varying[name] = parameter, chains
            else:
                self._constant[name] = self._gathered([chain[0] for chain in chains], parameter, "")

    def resolve(self, name: str, position: float) -> dict[str, Any]:
        if not self._varying:
            return self._constant
        resolved = dict(self._constant)
        for key, (parameter, chains) in self._varying.items():
            values = [_first(chain, name, position) for chain in chains]
            resolved[key] = self._gathered(values, parameter, f"{name}: ")
        return resolved

    def _gathered(self, values: list, parameter, where: str) -> Any:
        if not parameter.per_expert:
            return values[0]
        lacking = [expert for expert, value in zip(self._names, values, strict=True) if value is None]
        if lacking and len(lacking) < len(values):
            raise RecipeError(f"{where}{_half_given(parameter.name, lacking)}")
        return None if lacking else tuple(values)


def _half_given(name: str, lacking: list[str]) -> str:
    return f"{name}: none for {', '.join(lacking)}, one for the other experts; give all of them one"


def _by_known_name(values: dict[str, Any], method) -> dict[str, Any]:
    return {name: value for key, value in values.items() if (name := _known_as(key, method)) is not None}


def _first(chain: list, name: str, position: float) -> Any:
    for setting in chain:
        value = setting(name, position) if callable(setting) else setting
        if value is not _SILENT:
            return value
    raise AssertionError("a chain ends in the method's default")


def _prepare(setting: Any, parameter) -> Any:
    """A plain value, or a function of tensor name and position."""
    convert = _converter(parameter)
    if _is_filtered(setting):
        rules = [(item["filter"], _prepare(item["value"], parameter)) for item in setting]
        return lambda name, position: _matching(rules, name, position)
    if isinstance(setting, list) and parameter.kind != "patterns":
        return _gradient([convert(item) for item in setting], parameter)
    return convert(setting)


def _matching(rules: list, name: str, position: float) -> Any:
    for part, value in rules:
        if part == "*" or part in name:
            return value(name, position) if callable(value) else value
    return _SILENT


def _gradient(points: list, parameter) -> Any:
    if len(points) == 1:
        return points[0]
    last = len(points) - 1
    if parameter.kind not in ("number", "integer") and not all(_is_number(point) for point in points):
        return lambda name, position: points[int(position * last)]
    finish = round if parameter.kind == "integer" else float

    def between(name: str, position: float) -> Any:
        at = position * last
        before = min(int(at), last - 1)
        share = at - before
        return finish((1 - share) * points[before] + share * points[before + 1])

    return between


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, list) and any(isinstance(item, dict) for item in setting)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _converter(parameter) -> Callable[[Any], Any]:
    """What turns one value as written into one the method takes, or raises ValueError."""
    if parameter.kind == "number-or-choice":
        return lambda value: value if value in parameter.choices and isinstance(value, str) else _number(value)
    if parameter.kind == "choice":
        return lambda value: _choice(value, parameter)
    return _CONVERTERS[parameter.kind]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _integer(value: Any) -> int:
    if (number := _number(value)) != int(number):
        raise ValueError
    return int(number)


def _flag(value: Any) -> bool:
    if value not in (0, 1):  # mergekit's recipes also write 1.0
        raise ValueError
    return bool(value)


def _choice(value: Any, parameter) -> Any:
    if value not in parameter.choices and value != parameter.default:
        raise ValueError
    return value


def _patterns(value: Any) -> Any:
    parts = (value,) if isinstance(value, str) else tuple(value)
    for part in parts:
        re.compile(part)
    return parts


_CONVERTERS = {"number": _number, "integer": _integer, "flag": _flag, "patterns": _patterns}


def _expected(parameter) -> str:
    choices = ", ".join(map(str, parameter.choices))
    return {
        "number": "a finite number",
        "integer": "a whole number",
        "flag": "true or false",
        "choice": f"one of {choices}",
        "patterns": "a regular expression or a list of them",
        "number-or-choice": f"a finite number or one of {choices}",
    }[parameter.kind]
