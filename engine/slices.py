"""Slices: layers of models stacked under new numbers, each slice a merge of its own, together one plan.

Nothing is known of any architecture: a layer is recognised by the number in its tensors' names, as for gradients.
Embeddings come from the models of the first slice, all else outside the layers from those of the last.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from freemerge.checkpoint.header import TensorInfo
from freemerge.checkpoint.view import CheckpointView
from freemerge.errors import PlanError, listed
from freemerge.kernels.array import Array
from freemerge.methods import Method
from freemerge.plan import REMEDY, Plan, Planner, TensorTask, lay_out
from freemerge.recipe import Recipe, Slice
from freemerge.settings import config_parts, insist_on, is_embedding, layer_of, layer_stacks
from freemerge.vocabulary import Vocabulary

# config.json's words for how many layers there are
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")


@dataclass(frozen=True)
class PlanInParts(Plan):
    """A plan whose tensors are merged by the plans of their slices, or modules: `parts`, by the tensor's name."""

    parts: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.base.config

    @property
    def uses_base(self) -> bool:
        return any(part.uses_base for part in self.parts.values())

    def inputs(self, task: TensorTask) -> list[tuple[Any, str]]:
        return self.parts[task.name].inputs(task)

    def read_experts(self, task: TensorTask, run: tuple[int, int] | None = None) -> list[Array | None]:
        return self.parts[task.name].read_experts(task, run)

    def merge(self, task: TensorTask, base: Array, experts: Sequence[Array | None], out: Array) -> None:
        self.parts[task.name].merge(task, base, experts, out)

    def why_not_finite(self, task: TensorTask, base: Array, experts: Sequence[Array | None]) -> str:
        return self.parts[task.name].why_not_finite(task, base, experts)


def plan_slices(
    recipe: Recipe,
    method: Method,
    base,
    experts: Sequence,
    *,
    shard_size: int | None,
    vocabulary: Vocabulary | None = None,
) -> PlanInParts:
    """The plan of a recipe with slices.

    Args:
        base: the open base, or the first model where the recipe has none: whose configuration the result has.
        experts: open models, as the recipe's experts.
        vocabulary: what the recipe's tokenizer means for them, if it has one.

    Raises:
        RecipeError: recipe and method do not agree.
        PlanError: checkpoints do not have these layers, or do not fit together; with every problem found.
    """
    insist_on(recipe, method)
    stacks, problems = _find_stacks(dict.fromkeys((base, *experts)))
    _insist_on_none(problems)
    reference = stacks[base]
    models = {expert.model: stacks[checkpoint] for expert, checkpoint in zip(recipe.experts, experts, strict=True)}
    sources = [_sources(piece, models, reference) for piece in recipe.slices]
    _insist_on_none(_misplaced(sources, reference))
    planners = list(_planners(recipe, sources, vocabulary))
    matchers = [planner.matcher(piece.recipe, method) for piece, planner in zip(recipe.slices, planners, strict=True)]
    problems = [f"slices[{k}]: {problem}" for k, matcher in enumerate(matchers) for problem in matcher.problems]
    headers = vocabulary.shapes(base) if vocabulary else base.tensors
    _insist_on_none(problems or _misfits([planner.base for planner in planners], reference, headers))
    parts, tasks = {}, []
    for piece, planner, matcher in zip(recipe.slices, planners, matchers, strict=True):
        of_slice = planner.tasks(piece.recipe, method, matcher.matches)
        part = Plan(piece.recipe, method, planner.base, planner.experts, of_slice, [])
        parts |= dict.fromkeys((task.name for task in of_slice), part)
        tasks += of_slice
    warnings = [f"slices[{k}]: {warning}" for k, matcher in enumerate(matchers) for warning in matcher.warnings]
    origins = [(stack.config, layer) for of_slice in sources for stack, layers in of_slice[:1] for layer in layers]
    config = _restacked(reference, origins)
    if config == reference.config and len(origins) != reference.layers:
        warnings.append("config.json does not say how many layers there are; whoever loads the result has to")
    if vocabulary:
        config = vocabulary.config(config)
    whole = CheckpointView(base, {name: (part.base, name) for name, part in parts.items()}, config)
    shards = lay_out(tasks, shard_size)
    return PlanInParts(
        recipe, method, whole, list(experts), tasks, shards, warnings, vocabulary=vocabulary, parts=parts
    )


class _Stack:
    """A checkpoint's stack of layers: the one there is, or the one as long as its configuration says.

    Raises:
        ValueError: there is none, or no telling which.
    """

    def __init__(self, checkpoint):
        self.checkpoint, self.label, self.config = checkpoint, checkpoint.label, checkpoint.config
        found = layer_stacks(checkpoint.tensors)
        counts = {part[key] for part in config_parts(self.config) for key in _COUNTS if key in part}
        fitting = [stack for stack, layers in found.items() if len(found) == 1 or layers in counts]
        if len(fitting) != 1:
            said = ", ".join(f"{stack} ({layers})" for stack, layers in found.items())
            which = f"slices cannot tell which stack of layers is meant: {said}" if found else "no layers to slice"
            raise ValueError(f"{self.label}: {which}")
        self.name, self.layers = fitting[0], found[fitting[0]]

    def layer(self, name: str) -> int | None:
        place = layer_of(name)
        return place[1] if place is not None and place[0] == self.name else None

    def renumbered(self, name: str, layer: int | str) -> str:
        head = f"{self.name}." if self.name else ""
        return f"{head}{layer}.{name.removeprefix(head).partition('.')[2]}"

    def view(self, layers: range, offset: int, outside: Callable[[str], bool]) -> CheckpointView:
        """`layers` renumbered from `offset` on, and of the tensors outside the stack those wanted."""
        places = {}
        for name in self.checkpoint.tensors:
            layer = self.layer(name)
            if layer is None and outside(name):
                places[name] = self.checkpoint, name
            elif layer in layers:
                places[self.renumbered(name, layer - layers.start + offset)] = self.checkpoint, name
        return CheckpointView(self.checkpoint, places)


_Sources = list[tuple[_Stack, range]]  # of a slice, its base first if it has one


def _find_stacks(checkpoints: Iterable) -> tuple[dict[Any, _Stack], list[str]]:
    stacks, problems = {}, []
    for checkpoint in checkpoints:
        try:
            stacks[checkpoint] = _Stack(checkpoint)
        except ValueError as error:
            problems.append(str(error))
    return stacks, problems


def _sources(piece: Slice, models: Mapping[str, _Stack], reference: _Stack) -> _Sources:
    entries = [(expert.model, layers) for expert, layers in zip(piece.recipe.experts, piece.ranges, strict=True)]
    base = [(piece.recipe.base, piece.base_range)] if piece.base_range else []
    return [(models.get(model, reference), range(*layers)) for model, layers in base + entries]


def _misplaced(sources: list[_Sources], reference: _Stack) -> list[str]:
    problems = []
    for k, of_slice in enumerate(sources):
        for stack, layers in of_slice:
            if layers.stop > stack.layers:
                said = f"[{layers.start}, {layers.stop}] of {stack.label}"
                problems.append(f"slices[{k}]: layer_range {said}: it has {stack.layers} layers")
    for stack in dict.fromkeys(stack for of_slice in sources for stack, _ in of_slice):
        if stack.name != reference.name:
            theirs = f"{reference.name} in {reference.label}, {stack.name} in {stack.label}"
            problems.append(f"the layers are called {theirs}: save both models with the same prefix")
    return problems


def _planners(recipe: Recipe, sources: list[_Sources], vocabulary: Vocabulary | None) -> Iterator[Planner]:
    offset, last = 0, len(sources) - 1
    for k, (piece, of_slice) in enumerate(zip(recipe.slices, sources, strict=True)):

        def outside(name: str, first: bool = k == 0, final: bool = k == last) -> bool:
            return first if is_embedding(name) else final

        views = [stack.view(layers, offset, outside) for stack, layers in of_slice]
        if vocabulary and k in (0, last):
            models = ([piece.recipe.base] if piece.base_range else []) + [e.model for e in piece.recipe.experts]
            views = vocabulary.aligned(list(zip(models, views, strict=True)), piece.recipe.base)
        positions = {}
        for name in views[0].tensors:
            layer = of_slice[0][0].layer(name)
            # as in mergekit: along the slice, all the way where it is one layer; the start outside
            positions[name] = (
                0.0 if layer is None else (layer - offset) / (piece.layers - 1) if piece.layers > 1 else 1.0
            )
        yield Planner(views[0], views[1:] if piece.base_range else views, positions)
        offset += piece.layers


def _misfits(bases: list[CheckpointView], reference: _Stack, headers: Mapping[str, TensorInfo]) -> list[str]:
    """What the result would have in another shape than the model whose configuration it has, or not at all."""
    shapes: dict[str, set] = {}
    for name, info in headers.items():
        shapes.setdefault(_kind(name, reference), set()).add(info.shape)
    problems, found = {}, set()
    for base in bases:
        for name, info in base.tensors.items():
            found.add(kind := _kind(name, reference))
            if info.shape not in shapes.get(kind, ()):
                theirs = " or ".join(str(list(shape)) for shape in sorted(shapes.get(kind, ()))) or "missing"
                said = f"{name}: {list(info.shape)} from {base.label}, {theirs} in {reference.label}"
                problems.setdefault((kind, base.label), said)
    lacking = [kind for kind in shapes if kind not in found and reference.layer(kind) is None and "*" not in kind]
    owner = bases[-1].label
    return [*problems.values(), *(f"{name}: in {reference.label}, missing from {owner}" for name in lacking)]


def _kind(name: str, reference: _Stack) -> str:
    """A tensor's name, with a star for the number of its layer."""
    return name if reference.layer(name) is None else reference.renumbered(name, "*")


def _restacked(reference: _Stack, origins: list[tuple[dict | None, int]]) -> dict | None:
    """The configuration for layers of these configurations and numbers: how many, and lists with a word for each."""
    config, name = copy.deepcopy(reference.config), reference.name
    for p, part in enumerate(_parts_about(name, config)):
        counts = [key for key in _counts(name, part) if part.get(key) == reference.layers]
        for key in [key for key, value in part.items() if _one_for_each(key, value, reference.layers)]:
            with suppress(IndexError, KeyError):  # a model that does not say it
                part[key] = [_parts_about(name, other)[p][key][layer] for other, layer in origins]
        part |= dict.fromkeys(counts, len(origins))
    return config


def _parts_about(stack: str, config: dict | None) -> list[dict]:
    """The parts of a configuration that speak of a stack: vision_config of "vision_tower.blocks" or "visual.blocks"."""
    others = {key: part for key, part in (config or {}).items() if key.endswith("_config") and isinstance(part, dict)}
    named = [part for key, part in others.items() if key[:3] in stack and part not in config_parts(config)]
    return named or config_parts(config)


def _counts(stack: str, part: dict) -> list[str]:
    """The words for its number of layers, of an encoder or decoder its own where there are any."""
    side = next((word for word in stack.split(".") if word in ("encoder", "decoder")), None)
    own = [key for key in (f"{side}_layers", f"num_{side}_layers") if key in part]
    return own or list(_COUNTS)


def _one_for_each(key: str, value: Any, layers: int) -> bool:
    """Whether it says something of each layer, like layer_types; not a list of layers' numbers."""
    listed_words = isinstance(value, list) and all(isinstance(item, str) or item in (0, 1) for item in value)
    return "layer" in key and listed_words and len(value) == layers


def _insist_on_none(problems: list[str]) -> None:
    if problems:
        raise PlanError(listed(problems, REMEDY))
