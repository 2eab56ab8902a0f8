"""Run a plan whose inputs are in memory already: one tensor after the other, with no threads but those of the ops.

On a GPU nothing waits for it before all of its work is queued.
"""

import sys
from collections.abc import Iterator

import numpy as np

from freemerge.checkpoint.checksum import PIECE
from freemerge.errors import CheckpointError, listed
from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import Array, dtype_of, empty, is_float, is_tensor, numel
from freemerge.plan import Plan, TensorTask

REMEDY = "Mend the model, or pass check_finite=False to merge it as it is."


def run(plan: Plan, sink, *, extraction=None, check_finite: bool = True) -> None:
    """Merge every tensor of `plan` into `sink`; inputs are NumPy arrays, or tensors, those of a task on one device.

    Args:
        plan, sink, extraction, check_finite: as for stream.Stream.

    Raises:
        CheckpointError: NaN or Inf in the result, and in which of its tensors; all of it is in the sink.
    """
    for _ in range(plan.method.sweeps if plan.measured else 0):
        if plan.is_settled:
            break
        plan = plan.settle({task.name: _measure_task(plan, task) for task in plan.measured})
    watch = _Finiteness(plan) if check_finite else None
    for task in plan.tasks:
        if task.match.same_as is None:
            _merge_task(plan, task, sink, extraction, watch)
    if watch is not None:
        watch.insist()
    for task in plan.tasks:
        if task.match.same_as is not None:
            sink.tie(task.name, task.match.same_as)
    if extraction is not None:
        extraction.finish()


def _measure_task(plan: Plan, task: TensorTask) -> np.ndarray:
    return plan.measure(task, plan.base.read(task.name), plan.read_experts(task))


def _merge_task(plan: Plan, task: TensorTask, sink, extraction, watch: "_Finiteness | None") -> None:
    base = plan.base.read(task.name)
    experts = plan.read_experts(task) if task.settings is not None else []
    home = sink.direct(task.name)
    there = home is not None and _lies_with(home, base)
    out = home if there else empty(task.shape, task.dtype, base)
    for run_base, run_experts, run_out in _runs(task, base, experts, out):
        plan.merge(task, run_base, run_experts, run_out)
        if watch is not None:
            watch.look_at(task, run_out)
    if extraction is not None and task.settings is not None:
        cut = extraction.cut(task, base, out, experts)
        if watch is not None and cut is not None:
            for array in cut.floats:
                watch.look_at(task, array)
        extraction.write(task, cut)
    if not there:
        sink.write(task.name, 0, out)


def _lies_with(home: Array, base: Array) -> bool:
    if is_tensor(home) and is_tensor(base):
        return home.device == base.device
    return is_tensor(home) == is_tensor(base)


def _runs(
    task: TensorTask, base: Array, experts: list[Array | None], out: Array
) -> Iterator[tuple[Array, list[Array | None], Array]]:
    """The whole tensor; on the CPU, where the method allows it, runs that the cache holds until they are checked."""
    step = PIECE // task.dtype.itemsize
    if is_tensor(out) or task.size <= step or not task.elementwise:
        yield base, experts, out
        return
    base, out = base.reshape(-1), out.reshape(-1)
    experts = [None if expert is None else expert.reshape(-1) for expert in experts]
    for start in range(0, task.size, step):
        run = slice(start, start + step)
        yield base[run], [None if expert is None else expert[run] for expert in experts], out[run]


class _Finiteness:
    """Which tensors of a result hold NaN or Inf: known at once on the CPU, on a GPU when all of them are merged."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._broken: dict[str, TensorTask] = {}
        self._largest: list[tuple[TensorTask, Array]] = []

    def look_at(self, task: TensorTask, out: Array) -> None:
        if not is_float(dtype_of(out)) or not numel(out):
            return
        if is_tensor(out):
            self._largest.append((task, _largest_magnitude(out)))
        elif not all_finite(out):
            self._broken[task.name] = task

    def insist(self) -> None:
        """Raise CheckpointError where something was found, naming the inputs that have it too."""
        if self._largest:
            torch = sys.modules["torch"]
            device = self._largest[0][1].device  # a model may lie on several
            finite = torch.stack([largest.to(device) for _, largest in self._largest]).isfinite().tolist()
            tasks = [task for task, _ in self._largest]
            self._broken |= {task.name: task for task, fine in zip(tasks, finite, strict=True) if not fine}
        if self._broken:
            raise CheckpointError(listed(map(self._why, self._broken.values()), REMEDY))

    def _why(self, task: TensorTask) -> str:
        experts = self._plan.read_experts(task) if task.settings is not None else []
        return self._plan.why_not_finite(task, self._plan.base.read(task.name), experts)


def _largest_magnitude(tensor: Array) -> Array:
    """A number on the tensor's device; NaN where there is a NaN. Not waited for."""
    torch = sys.modules["torch"]
    if dtype_of(tensor).itemsize == 1:
        tensor = tensor.to(torch.float32)  # torch reduces no float8
    return torch.linalg.vector_norm(tensor, float("inf"))
