"""The plan of a merge: every tensor of the result, its inputs, what happens to it; made from headers alone."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from freemerge import __version__
from freemerge.adapters import check_factors
from freemerge.checkpoint.layout import Entry, ShardPlan, plan_shards
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.errors import CheckpointError, PlanError, RecipeError, listed
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import Array, is_float, is_tensor
from freemerge.match import Match, Matcher, never_fits
from freemerge.methods import Method, TensorPlan
from freemerge.recipe import Recipe
from freemerge.settings import explained_by, insist_on, layer_positions, settings
from freemerge.vocabulary import Vocabulary

REMEDY = "Merge models of one architecture, or mend the recipe; `freemerge inspect` lists what each model holds."


@dataclass(frozen=True)
class TensorTask:
    """One tensor of the result.

    Args:
        name, shape, dtype: as they are written.
        match: where the inputs lie.
        settings: what merge_tensor is called with; None where the base's tensor is copied.
        transform: what is done to the tensor, in words.
        workspace: bytes of memory the method needs beside the result.
        elementwise: whether any run of elements can be merged alone.
        made: bytes of memory its inputs take, as adapters are applied when they are read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    match: Match
    settings: dict[str, Any] | None
    transform: str
    workspace: int = 0
    elementwise: bool = True
    made: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A checked merge, ready to run: `base` and `experts` are open, `shards` says where every byte goes.

    `devices` names what is to run it, for people; `settled` is what a method of model scope knows of the whole model,
    once it has been measured; `earlier` and `kept` are the running state it continues from, and the one it leaves, if
    any (running_state.py); `vocabulary` is what the recipe's tokenizer means for these models, if it has one;
    `chat_template` replaces the tokenizer's own.
    """

    recipe: Recipe
    method: Method
    base: Any
    experts: list
    tasks: list[TensorTask]
    shards: list[ShardPlan]
    warnings: list[str] = field(default_factory=list)
    devices: tuple[str, ...] = ("cpu",)
    settled: Any = None
    earlier: Any = None
    kept: Any = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None

    @property
    def bytes_in(self) -> int:
        return sum(self.bytes_read(task) for task in self.tasks)

    @property
    def measured(self) -> list[TensorTask]:
        """The tensors that are merged: a method of model scope looks at all of them before it merges any."""
        return [task for task in self.tasks if task.settings is not None and not task.match.same_as]

    @property
    def leaves_experts(self) -> bool:
        """Whether experts are written beside the result."""
        return any(self.method.leaves_experts(task.settings) for task in self.measured[:1])

    @property
    def bytes_out(self) -> int:
        return sum(task.nbytes for task in self.tasks)

    @property
    def keeps_state(self) -> bool:
        """Whether a result on disk has the running state beside it."""
        return self.method.keeps_state and self.recipe.keep_state is not False and bool(self.measured)

    @property
    def bytes_state(self) -> int:
        """What that state takes."""
        return sum(task.size for task in self.measured) * 4 if self.keeps_state else 0

    @property
    def dtype(self) -> np.dtype | None:
        """The floating dtype most bytes of the result have; None without any."""
        nbytes: dict[np.dtype, int] = {}
        for task in self.tasks:
            if is_float(task.dtype):
                nbytes[task.dtype] = nbytes.get(task.dtype, 0) + task.nbytes
        return max(nbytes, key=nbytes.get, default=None)

    @property
    def uses_base(self) -> bool:
        """Whether merged tensors are made from the base's too."""
        return self.method.uses_base and self.recipe.base is not None

    @property
    def config(self) -> dict[str, Any] | None:
        """The result's config.json where it is not the base's."""
        return self.base.config if self.vocabulary else None

    @property
    def opened(self) -> list:
        """Every checkpoint that it reads."""
        return [self.base, *self.experts, *([self.earlier.checkpoint] if self.earlier else [])]

    def inputs(self, task: TensorTask) -> list[tuple[Any, str]]:
        """What a tensor is made from: checkpoints and names in them."""
        base = [(self.base, task.name)]
        if task.settings is None or task.match.same_as:
            return base
        experts = zip(self.experts, task.match.sources, strict=True)
        return (base if self.uses_base else []) + [(expert, source) for expert, source in experts if source is not None]

    def bytes_read(self, task: TensorTask) -> int:
        return sum(checkpoint.tensors[name].nbytes for checkpoint, name in self.inputs(task))

    def read_base(self, task: TensorTask, run: tuple[int, int] | None = None) -> Array:
        """A tensor of the base; of a run (begin, end) its elements, in order."""
        return self.base.read(task.name) if run is None else self.base.read_run(task.name, *run)

    def read_experts(self, task: TensorTask, run: tuple[int, int] | None = None) -> list[Array | None]:
        """A tensor of every expert, or a run of it, in the base's shape; None for an expert that is left out of it."""
        sources = zip(self.experts, task.match.sources, strict=True)
        return [None if source is None else _read(expert, source, task.shape, run) for expert, source in sources]

    def merge(self, task: TensorTask, base: Array, experts: Sequence[Array | None], out: Array) -> None:
        """Write a tensor of the result, or of an elementwise one the same run of elements of each array.

        Args:
            base: the base's tensor, or a run of it.
            experts: the tensor of each expert, None for one that is left out of it; not looked at where it is copied.
            out: of the task's dtype.
        """
        if task.settings is not None:
            used = base if self.uses_base else None
            known = self._known | self._state(task, base)
            self.method.module.merge_tensor(used, experts, name=task.name, **task.settings, **known, out=out)
        elif is_float(task.dtype):
            add_task_vectors(base, [], [], out=out)
        else:
            out[...] = base

    def measure(self, task: TensorTask, base: Array, experts: Sequence[Array]) -> np.ndarray:
        """Measure one of the tensors `measured`; arrays as for `merge`, of the whole tensor.

        Raises:
            CheckpointError: the tensor holds NaN or Inf.
        """
        used = base if self.uses_base else None
        state = self._state(task, base)
        known = self._so_far | state
        found = self.method.module.measure_tensor(used, experts, name=task.name, **task.settings, **known)
        if not np.isfinite(found).all():
            raise CheckpointError(listed([self.why_not_finite(task, base, experts)], "Mend the model."))
        if self.kept is not None and is_tensor(base):
            self.kept.array(task.name)[...] = placed_like(state["kept"], self.kept.array(task.name))
        return found

    def settle(self, statistics: Mapping[str, np.ndarray]) -> "Plan":
        """The plan after a sweep that measured the tensors `measured`."""
        first = self.measured[0]
        in_order = {task.name: statistics[task.name] for task in self.measured}
        known = self._so_far | ({"earlier": self.earlier.facts} if self.earlier else {})
        return replace(self, settled=self.method.module.settle(in_order, **first.settings, **known))

    @property
    def is_settled(self) -> bool:
        """Whether the method of model scope knows enough before all of its sweeps."""
        enough = getattr(self.method.module, "is_settled", None)
        return self.settled is not None and enough is not None and enough(self.settled)

    @property
    def _known(self) -> dict[str, Any]:
        return {"settled": self.settled} if self.method.scope == "model" else {}

    @property
    def _so_far(self) -> dict[str, Any]:
        return {} if self.settled is None else self._known

    def _state(self, task: TensorTask, like: Array) -> dict[str, Any]:
        """The arrays of a running state, where the others lie."""
        known = {"earlier": self.earlier, "kept": self.kept}
        arrays = {key: state.array(task.name) for key, state in known.items() if state is not None}
        return {key: placed_like(array, like) for key, array in arrays.items()}

    def why_not_finite(self, task: TensorTask, base: Array, experts: Sequence[Array | None]) -> str:
        """What to say of a tensor with NaN or Inf in its result; arrays as for `merge`."""
        labels = [checkpoint.label for checkpoint in (self.base, *self.experts)]
        inputs = zip(labels, [base, *experts], strict=False)
        guilty = [label for label, array in inputs if array is not None and not all_finite(array)]
        found = f"NaN or Inf in {', '.join(guilty)}" if guilty else f"the result does not fit {task.dtype}"
        return f"{task.name}: {found}"

    @property
    def fingerprint(self) -> str:
        """Changes with anything that could change a byte of the result."""
        inputs = [checkpoint.fingerprint() for checkpoint in self.opened]
        tasks = [[t.name, list(t.shape), str(t.dtype), repr(t.settings)] for t in self.tasks]
        tokens = self.vocabulary.fingerprint if self.vocabulary else None
        said = json.dumps([__version__, self.recipe.to_yaml(), inputs, tasks, tokens], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each tensor, as `freemerge merge --dry-run` prints them."""
        return [
            {
                "tensor": task.name,
                "shape": list(task.shape),
                "dtype": str(task.dtype),
                "action": _action(task),
                "transform": task.transform,
                "bytes_in": self.bytes_read(task),
                "bytes_out": task.nbytes,
                "workspace": task.workspace,
            }
            for task in self.tasks
        ]

    def summary(self) -> dict[str, Any]:
        """The whole plan in one small dict; bytes are plain numbers."""
        return {
            "method": self.method.name,
            "tensors": len(self.tasks),
            "merged": sum(task.settings is not None and not task.match.same_as for task in self.tasks),
            "experts": len(self.experts),
            "passes": 1 + self.method.sweeps,
            "devices": list(self.devices),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            **({"bytes_state": self.bytes_state} if self.keeps_state else {}),
            "shards": [shard.filename for shard in self.shards],
            "largest_tensor": max((task.nbytes + task.workspace for task in self.tasks), default=0),
            "warnings": self.warnings,
        }


def make_plan(
    recipe: Recipe,
    method: Method,
    base,
    experts: Sequence,
    *,
    shard_size: int | None,
    vocabulary: Vocabulary | None = None,
) -> Plan:
    """The plan of one merge; see `Planner.plan`.

    Args:
        base: the open base; for a method without one, any of the models, to copy from.
        experts: open experts in the recipe's order.
        vocabulary: what the recipe's tokenizer means for them, if it has one.
    """
    if vocabulary is None:
        return Planner(base, experts).plan(recipe, method, shard_size=shard_size)
    models = [recipe.models[0], *(expert.model for expert in recipe.experts)]
    base, *experts = vocabulary.aligned(list(zip(models, [base, *experts], strict=True)))
    plan = Planner(base, experts).plan(recipe, method, shard_size=shard_size)
    return replace(plan, vocabulary=vocabulary)


class Planner:
    """Plans one merge of the same checkpoints after another; what no recipe can change is worked out once.

    Args:
        positions: of the base's tensors, for gradients; those `layer_positions` finds if not given.
    """

    def __init__(self, base, experts: Sequence, positions: Mapping[str, float] | None = None):
        self.base, self.experts = base, list(experts)
        self._positions = layer_positions(base.tensors) if positions is None else positions
        self._settled: Matcher | None = None  # one that holds for every recipe

    def plan(
        self,
        recipe: Recipe,
        method: Method,
        *,
        shard_size: int | None = None,
        dtypes: Mapping[str, np.dtype] | None = None,
    ) -> Plan:
        """Check that recipe and checkpoints fit together and lay the result out.

        Args:
            recipe: what is asked for.
            method: the method it names.
            shard_size: bytes a shard of the result may have; None for a result that is not written to files.
            dtypes: of the result's floating tensors, by name, where not the recipe decides.

        Raises:
            RecipeError: recipe and method do not agree.
            PlanError: checkpoints do not fit together; with every problem found.
        """
        insist_on(recipe, method)
        matcher = self.matcher(recipe, method)
        check_factors(method, [*([self.base] if method.uses_base else []), *self.experts], matcher.problems)
        if matcher.problems:
            raise PlanError(listed(matcher.problems, REMEDY))
        tasks = self.tasks(recipe, method, matcher.matches, dtypes)
        shards = lay_out(tasks, shard_size, getattr(self.base, "weights_file", None))
        return Plan(recipe, method, self.base, self.experts, tasks, shards, matcher.warnings)

    def matcher(self, recipe: Recipe, method: Method) -> Matcher:
        if self._settled is not None:
            return self._settled
        matcher = Matcher(self.base, self.experts, fit=_fit(recipe, method))
        if not matcher.asked_fit:
            self._settled = matcher
        return matcher

    def tasks(
        self, recipe: Recipe, method: Method, matches: list[Match], dtypes: Mapping[str, np.dtype] | None = None
    ) -> list[TensorTask]:
        wanted = recipe.out_dtype or recipe.dtype
        plan_tensor, plain = getattr(method.module, "plan_tensor", None), TensorPlan("merge", method.name)
        tasks = []
        for match in matches:
            name, info = match.name, self.base.tensors[match.name]
            if not is_float(info.dtype):
                tasks.append(TensorTask(name, info.shape, info.dtype, match, None, "copy"))
                continue
            dtype = dtypes[name] if dtypes and name in dtypes else info.dtype if wanted is None else wanted
            if not any(match.sources):
                tasks.append(TensorTask(name, info.shape, dtype, match, None, "copy: no expert takes part"))
                continue
            chosen = settings(recipe, method, name, self._positions[name])
            try:
                planned = plan_tensor(name, info.shape, experts=len(match.sources), **chosen) if plan_tensor else plain
            except RecipeError as error:
                raise RecipeError(listed([str(error)], explained_by(method))) from None
            # an expert is cut out of whole tensors
            by_runs = method.scope == "element" or planned.elementwise
            elementwise = by_runs and not method.leaves_experts(chosen)
            done = (planned.transform, planned.workspace, elementwise, self._made(method, match))
            tasks.append(TensorTask(name, info.shape, dtype, match, chosen, *done))
        return tasks

    def _made(self, method: Method, match: Match) -> int:
        inputs = [(self.base, match.name)] if method.uses_base else []
        inputs += [pair for pair in zip(self.experts, match.sources, strict=True) if pair[1] is not None]
        return sum(checkpoint.nbytes_made(name) for checkpoint, name in inputs)


def lay_out(tasks: list[TensorTask], shard_size: int | None, filename: str | None = None) -> list[ShardPlan]:
    """The shards of a result, its tasks brought into their order; none for one that is not written to files.

    Args:
        filename: of the one file that a result has which is no model.
    """
    entries = [Entry(task.name, task.dtype, task.shape) for task in tasks]
    shards = [] if shard_size is None else plan_shards(entries, shard_size, filename)
    order = {entry.name: i for i, entry in enumerate(entry for shard in shards for entry in shard.entries)}
    tasks.sort(key=lambda task: order.get(task.name, 0))
    return shards


def _fit(recipe: Recipe, method: Method):
    """How this merge takes an expert's tensor of another shape than the base's."""
    hook = getattr(method.module, "fit_expert", None)
    if hook is None:
        return never_fits
    return lambda name, shape, expert_shape: hook(name, shape, expert_shape, **settings(recipe, method, name, None))


def _read(expert, source: str, shape: tuple[int, ...], run: tuple[int, int] | None) -> Array:
    if run is not None and expert.tensors[source].shape == shape:
        return expert.read_run(source, *run)
    array = _cropped(expert.read(source), shape)
    return array if run is None else array.reshape(-1)[slice(*run)]


def _cropped(expert: Array, shape: tuple[int, ...]) -> Array:
    if expert.shape == shape:
        return expert
    part = expert[tuple(slice(side) for side in shape)]
    return part.contiguous() if is_tensor(part) else np.ascontiguousarray(part)


def _action(task: TensorTask) -> str:
    if task.match.same_as:
        return f"tied to {task.match.same_as}"
    return "copy" if task.settings is None else "merge"
