"""Where a unit of a stream is merged: in host memory, or on a GPU that its inputs are sent to.

A placement has

    fits(unit)       whether it has the memory for it
    reserved(unit)   with it: the memory that the work takes elsewhere than in buffers
    held(unit)       with it: (base, experts, out), ready for the method
    store(unit, out, hashed)   bring `out` to the sink, calling hashed(first_element, array) with runs of it, in order
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from freemerge.accelerator import Accelerator, Lane
from freemerge.buffers import BufferPool
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.errors import PlanError
from freemerge.kernels.array import Array, is_tensor
from freemerge.plan import Plan, TensorTask

# Bytes an element that ops which look at a whole tensor put beside inputs and result on a GPU; a filter keeps spectra
# and the task vector as float32. A guess above what is seen: where it is too low, memory runs out and a retry follows.
BESIDE, BESIDE_FILTERED = 8, 16

Hashed = Callable[[int, Array], None]


@dataclass(frozen=True)
class Unit:
    """A run of elements of one tensor, merged and written at once; all of them unless it is merged by element."""

    task: TensorTask
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.task.size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.task.shape if self.whole else (self.stop - self.start,)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.task.dtype.itemsize

    @property
    def beside(self) -> int:
        """Bytes it takes on the host beside its result: the method's workspace, and inputs that are computed."""
        return self.task.workspace + self.task.made * (self.stop - self.start) // max(1, self.task.size)

    def halves(self, step: int) -> "tuple[Unit, Unit]":
        """The same in two, cut at a multiple of `step` elements; larger than that, it has such a place."""
        middle = self.start + -(-(self.stop - self.start) // (2 * step)) * step
        return Unit(self.task, self.start, middle), Unit(self.task, middle, self.stop)

    def of(self, array: Array) -> Array:
        """The unit's elements of a whole tensor, in the unit's shape."""
        return array if self.whole else array.reshape(-1)[self.start : self.stop]


class OnHost:
    """In host memory: inputs are views of files or of the caller's arrays, results go through buffers.

    A result that does not fit the buffers is written straight to the mapped output.
    """

    def __init__(self, plan: Plan, sink, buffers: BufferPool):
        self._plan, self._sink, self._buffers = plan, sink, buffers

    def fits(self, unit: Unit) -> bool:
        return True

    def reserved(self, unit: Unit) -> AbstractContextManager:
        return nullcontext()

    @contextmanager
    def held(self, unit: Unit) -> Iterator[tuple[Array, list[Array | None], Array]]:
        home = self._home(unit)
        if home is not None:
            yield *inputs(self._plan, unit), unit.of(home)
            return
        with self._buffers.borrow(unit.nbytes, beside=unit.beside) as buffer:
            base, experts = inputs(self._plan, unit)
            out = buffer.view(unit.task.dtype).reshape(unit.shape)
            # from a GPU, where this unit does not fit
            yield placed_like(base, out), [e if e is None else placed_like(e, out) for e in experts], out

    def store(self, unit: Unit, out: Array, hashed: Hashed) -> None:
        hashed(unit.start, out)
        if self._home(unit) is None:
            self._sink.write(unit.task.name, unit.start, out)

    def _home(self, unit: Unit) -> Array | None:
        """The memory the tensor belongs in, where the method is to write it there itself."""
        home = self._sink.direct(unit.task.name)
        if home is None:
            fits = self._buffers.fits(unit.nbytes, unit.beside)
            return None if fits else self._sink.map(unit.task.name)
        return home if is_tensor(home) == is_tensor(self._plan.base.read(unit.task.name)) else None


class OnAccelerator:
    """On a GPU, through a lane of its own: inputs are sent there, results fetched into the sink."""

    def __init__(self, plan: Plan, sink, accelerator: Accelerator, lane: Lane):
        self.accelerator = accelerator
        self._plan, self._sink, self._lane = plan, sink, lane

    def fits(self, unit: Unit) -> bool:
        return self.accelerator.fits(self.needed(unit))

    def needed(self, unit: Unit) -> int:
        """Bytes of the GPU's memory: inputs, result, and what the method puts beside them."""
        size = unit.stop - unit.start
        moved = unit.nbytes + self._plan.bytes_read(unit.task) * size // max(unit.task.size, 1)
        beside = 0 if unit.task.elementwise else BESIDE_FILTERED if unit.task.workspace else BESIDE
        return moved + unit.task.workspace + beside * size

    def reserved(self, unit: Unit) -> AbstractContextManager:
        return self.accelerator.reserve(self.needed(unit))

    @contextmanager
    def held(self, unit: Unit) -> Iterator[tuple[Array, list[Array | None], Array]]:
        base, experts = inputs(self._plan, unit)
        with self._lane.current():
            out = self._home(unit)
            if out is None:
                out = self._lane.empty(unit.shape, unit.task.dtype)
            sent = [e if e is None else self._lane.upload(e) for e in experts]
            yield self._lane.upload(base) if self._plan.uses_base else base, sent, out

    def store(self, unit: Unit, out: Array, hashed: Hashed) -> None:
        if self._home(unit) is not None:
            return
        for first, array in self._lane.download(out):
            hashed(unit.start + first, array)
            self._sink.write(unit.task.name, unit.start + first, array)

    def _home(self, unit: Unit) -> Array | None:
        home = self._sink.direct(unit.task.name)
        return unit.of(home) if home is not None and is_tensor(home) and home.device == self._lane.device else None


def inputs(plan: Plan, unit: Unit) -> tuple[Array, list[Array | None]]:
    """The unit's elements of the base and of every expert, where they lie; None for an expert that is left out."""
    run = None if unit.whole else (unit.start, unit.stop)
    return plan.read_base(unit.task, run), plan.read_experts(unit.task, run) if unit.task.settings is not None else []


def lies_on_gpu(plan: Plan) -> bool:
    """Whether inputs are tensors on a device, to be merged there."""
    return any(is_tensor(plan.base.read(task.name)) for task in plan.tasks)


def check_together(plan: Plan) -> None:
    """Raise PlanError where tensors that are merged with each other do not lie together."""
    apart = [task.name for task in plan.tasks if task.settings is not None and len(_places(plan, task)) > 1]
    if not apart:
        return
    listed = [_listed(checkpoint) for checkpoint in (plan.base, *plan.experts)]
    raise PlanError(
        "\n".join(
            [
                f"inputs lie apart, {apart[0]} for one, and nothing was merged",
                *(f"  {line}" for line in listed),
                "Move them together: .to(...) the base's device, or .cpu() for all.",
            ]
        )
    )


def _places(plan: Plan, task: TensorTask) -> set[str]:
    return {_place(checkpoint.read(name)) for checkpoint, name in plan.inputs(task)}


def _place(array: Array) -> str:
    return str(array.device) if is_tensor(array) else "the host, as NumPy arrays"


def _listed(checkpoint) -> str:
    counts = Counter(_place(checkpoint.read(name)) for name in checkpoint.tensors)
    return f"{checkpoint.label}: " + ", ".join(f"{count} tensors on {place}" for place, count in sorted(counts.items()))
