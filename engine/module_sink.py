"""Results straight into tensors that are there already: those of a live nn.Module, or of a state dict."""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.torch_arrays import from_torch, is_torch, placed_like, to_torch
from freemerge.errors import PlanError, listed
from freemerge.kernels.array import Array, dtype_of, is_tensor, numel
from freemerge.plan import Plan, TensorTask

REMEDY = "Give a module or a state dict of the merged architecture, apart from the models that are merged."


class Targets:
    """Where results are wanted: torch tensors and NumPy arrays by name.

    Args:
        into: nn.Module, whose state_dict names them, or a mapping.
    """

    def __init__(self, into: Any):
        given = into if isinstance(into, Mapping) else into.state_dict() if hasattr(into, "state_dict") else None
        if given is None:
            raise PlanError(f"into: a {type(into).__name__}, neither an nn.Module nor a state dict")
        self.values = {name: _without_gradient(value) for name, value in given.items()}
        self.unfit = {name: why for name, value in self.values.items() if (why := _unfit(value))}
        fit = {name: value for name, value in self.values.items() if name not in self.unfit}
        self.dtypes = {name: dtype_of(value) for name, value in fit.items()}
        self._spans = {name: _span(value) for name, value in fit.items()}

    def memory(self, name: str) -> tuple[int, int] | str:
        """The same for all that share their memory."""
        start, end = self._spans.get(name, (0, 0))
        return (start, end) if start < end else name


class ModuleSink:
    """Into `targets`, in place and in their own dtypes; what shares its memory is written once.

    Args:
        plan: made with `targets.dtypes`.
        inputs: the memory of what is merged; no target may lie there.
        device: a torch device whose tensors the ops take as they are, besides CUDA's: the CPU's, for the interpreter.

    Raises:
        PlanError: with everything that keeps the result from being written there. Nothing has been written then.
    """

    keeps_checksums = False

    def __init__(self, plan: Plan, targets: Targets, inputs: "Memory", device=None):
        problems = [*_misfits(plan, targets, inputs), *_shared(plan, targets), *_left_over(plan, targets)]
        if problems:
            raise PlanError(listed(problems, REMEDY))
        self.done, self.records = {}, {}
        self._targets, self._values = targets, targets.values
        self._homes = {task.name: _home(self._values[task.name], device) for task in plan.tasks}
        self.direct = self._homes.__getitem__

    def write(self, name: str, first_element: int, array: Array) -> None:
        target, stop = self._values[name], first_element + numel(array)
        if not is_torch(target):
            target.flat[first_element:stop] = placed_like(array, target).reshape(-1)
            return
        source = (array if is_tensor(array) else to_torch(array)).reshape(-1)
        if target.is_contiguous():
            target.view(-1)[first_element:stop].copy_(source)
        elif source.numel() == target.numel():
            target.copy_(source.view(target.shape))
        else:
            places = sys.modules["torch"].arange(first_element, stop, device=target.device)
            target.put_(places, source.to(target.device))

    def read(self, name: str) -> Array:
        return self._values[name]

    def tie(self, name: str, other: str) -> Array:
        if self._targets.memory(name) != self._targets.memory(other):
            self._values[name][...] = self._values[other]
        return self._values[name]

    def finish(self, name: str, record: dict) -> None:
        self.records[name] = record

    def tell_autograd(self) -> None:
        """Have autograd notice what ops have written past it: a graph that saved an old value then says so."""
        tensors = [value for value in self._values.values() if is_torch(value) and not value.is_inference()]
        if tensors:
            sys.modules["torch"].autograd.graph.increment_version(tensors)


class Memory:
    """The addresses that arrays take up."""

    def __init__(self, arrays: Iterable[Array]):
        self._starts, self._ends = [], []
        for start, end in sorted(_span(array) for array in arrays):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def overlaps(self, start: int, end: int) -> bool:
        before = bisect_left(self._starts, end) - 1
        return before >= 0 and self._ends[before] > start


def _span(array: Array) -> tuple[int, int]:
    start = array.data_ptr() if is_tensor(array) else array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _without_gradient(value: Any) -> Any:
    return value.detach() if is_torch(value) else value


def _unfit(value: Any) -> str | None:
    """Why nothing can be written to it."""
    if isinstance(value, np.ndarray):
        return None if value.flags.writeable and value.dtype in NAMES else f"read-only, or of dtype {value.dtype}"
    if not is_torch(value):
        return f"a {type(value).__name__}, neither a torch tensor nor a NumPy array"
    torch = sys.modules["torch"]
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return f"a {type(value).__name__} ({value.layout}, on {value.device}), not a plain dense tensor"
    return None


def _misfits(plan: Plan, targets: Targets, inputs: Memory) -> Iterator[str]:
    for task in plan.tasks:
        if task.name in targets.unfit:
            why = targets.unfit[task.name]
        elif task.name in targets.values:
            why = _misfit(task, targets, inputs)
        else:
            why = "merged, but not there to be written to"
        if why:
            yield f"{task.name}: {why}"


def _misfit(task: TensorTask, targets: Targets, inputs: Memory) -> str | None:
    shape, dtype, memory = targets.values[task.name].shape, targets.dtypes[task.name], targets.memory(task.name)
    if shape != task.shape:
        return f"{list(shape)} in the target, {list(task.shape)} in the result"
    if dtype != task.dtype:  # only of tensors that are no floats: those have the target's
        return f"{dtype} in the target, {task.dtype} in the result"
    if isinstance(memory, tuple) and inputs.overlaps(*memory):
        return "it is an input of this session: give a copy of that model"
    return None


def _shared(plan: Plan, targets: Targets) -> Iterator[str]:
    first: dict = {}
    for task in plan.tasks:
        merged_as = task.match.same_as or task.name
        other = first.setdefault(targets.memory(task.name), merged_as)
        if other != merged_as:
            yield f"{task.name}: the same memory as {other} in the target, a tensor of its own in the result"


def _left_over(plan: Plan, targets: Targets) -> Iterator[str]:
    written = {targets.memory(task.name) for task in plan.tasks}
    for name in targets.values:
        if targets.memory(name) not in written:
            yield f"{name}: in the target, but not in the result"


def _home(target: Array, device) -> Array | None:
    """Where an op can write it: the tensor itself on a GPU, a view of its memory on the CPU; None: not at all."""
    if not is_torch(target):
        return target if target.flags.c_contiguous else None
    if not target.is_contiguous() or target.is_neg():
        return None
    return target if target.device.type == "cuda" or target.device == device else from_torch(target)
