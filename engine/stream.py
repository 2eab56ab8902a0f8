"""Run a plan: read ahead, merge, write, all at once, within a memory limit. The only place with threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from freemerge.accelerator import CHUNK, Accelerator, is_out_of_memory
from freemerge.blas import blas_threads
from freemerge.buffers import BufferPool
from freemerge.checkpoint.checksum import PIECE, PieceChecksum, checksum
from freemerge.errors import CheckpointError, listed
from freemerge.kernels import dispatch
from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import Array, is_float
from freemerge.placement import OnAccelerator, OnHost, Unit
from freemerge.plan import Plan, TensorTask
from freemerge.readahead import ReadAhead

BESIDE_BUFFERS = 256 << 20  # of the memory limit: the interpreter, its libraries, small arrays
ON_GPU = 8  # pieces (checksum.PIECE) of a tensor that a GPU merges at once
MOST_PROBLEMS = 20


class Stream:
    """One run of a plan.

    Args:
        plan: what to do.
        sink: where results go (sinks.py); tensors in `sink.done` are skipped.
        extraction: cuts experts out of the finished tensors (experts/extract.py), if the method writes any.
        max_memory: bytes of anonymous memory to stay under. A result that does not fit is written straight
            to the mapped output.
        check_finite: whether an infinity or NaN in the result is an error.
        progress: called as progress(done_bytes, total_bytes) from any thread.
        accelerators: the GPUs that inputs are sent to (devices.find); without, they are merged on the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        sink,
        *,
        extraction=None,
        max_memory: int,
        check_finite: bool = True,
        progress: Callable | None = None,
        accelerators: Sequence[Accelerator] = (),
    ):
        self.plan, self.sink, self.extraction = plan, sink, extraction
        self.check_finite = check_finite
        self.accelerators = accelerators
        self.progress = _Progress(plan, progress)
        memory = max(max_memory - BESIDE_BUFFERS, max_memory // 2)
        # a quarter of the memory at most is for copies; see accelerator.Lane
        lanes = sum(_lanes(accelerator, accelerators) for accelerator in accelerators)
        self._chunk = min(CHUNK, max(4096, memory // (8 * max(lanes, 1)) // 4096 * 4096))
        buffers = BufferPool(memory - 2 * self._chunk * lanes)
        self._host = OnHost(plan, sink, buffers)
        self._units: deque[Unit] = deque()
        self._checksums: dict[str, PieceChecksum] = {}
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        self._problems: list[str] = []

    def run(self) -> None:
        todo = [task for task in self.plan.tasks if task.name not in self.sink.done]
        if self.accelerators:  # the largest first: one that came last would keep a single worker busy
            todo.sort(key=lambda task: -task.nbytes)
        for task in self.plan.tasks:
            if task.name in self.sink.done:
                self.progress.add(task, 1.0)
        if todo or self.plan.kept:  # what a resumed run finds of a state is not checked but made again
            self._survey()
        self._run_threads(todo, [unit for task in todo if not task.match.same_as for unit in self._split(task)])
        for task in todo:
            if task.match.same_as:
                self._copy_tied(task)
        if self.extraction:
            self.extraction.finish()

    def _survey(self) -> None:
        """What a method of model scope has to know of all tensors before it merges one."""
        tasks = self.plan.measured
        for _ in range(self.plan.method.sweeps if tasks else 0):
            if self.plan.is_settled:
                for task in tasks:
                    self.progress.add(task, 1.0, written=False)
                continue
            statistics: dict[str, np.ndarray] = {}
            self._run_threads(tasks, [Measurement(task, 0, task.size, statistics) for task in tasks])
            self.plan = self.plan.settle(statistics)

    def _split(self, task: TensorTask) -> Iterator[Unit]:
        if not task.elementwise:
            yield Unit(task, 0, task.size)
            return
        step = PIECE // task.dtype.itemsize * (ON_GPU if self.accelerators and task.settings is not None else 1)
        for start in range(0, max(task.size, 1), step):
            yield Unit(task, start, min(task.size, start + step))

    # -- threads ------------------------------------------------------------------------------------------------

    def _run_threads(self, todo: list[TensorTask], units: Iterable[Unit]) -> None:
        self._stop = False
        self._units.extend(units)
        ahead = ReadAhead(self.plan, [task for task in todo if not task.match.same_as])
        workers = [threading.Thread(target=self._work, args=(ahead, gpu), daemon=True) for gpu in self._crew()]
        for thread in (ahead, *workers):
            thread.start()
        try:
            with blas_threads(max(1, dispatch.threads() // len(workers))):
                for thread in workers:
                    while thread.is_alive():
                        thread.join(0.2)
        finally:
            self._stop = True
            ahead.stop()
            for thread in (ahead, *workers):
                thread.join()
        if self._failure is not None:
            raise self._failure
        if self._problems:
            raise CheckpointError(
                listed(self._problems, "Mend the model, or pass --allow-nonfinite to merge it as it is.")
            )

    def _crew(self) -> list[Accelerator | None]:
        """For each worker the GPU it serves, if any."""
        if self.accelerators:
            return [gpu for gpu in self.accelerators for _ in range(_lanes(gpu, self.accelerators))]
        # More workers than cores: while one waits for the disk or hashes, the ops of another use the pool of threads.
        return [None] * min(4, dispatch.threads() + 1)

    def _work(self, ahead: ReadAhead, accelerator: Accelerator | None) -> None:
        try:
            gpu = accelerator and OnAccelerator(self.plan, self.sink, accelerator, accelerator.lane(self._chunk))
            while not self._stop and (unit := self._next(gpu)) is not None:
                ahead.reached(unit.task)
                if self._run_unit(unit, gpu):
                    share = (unit.stop - unit.start) / max(1, unit.task.size)
                    self.progress.add(unit.task, share, written=not isinstance(unit, Measurement))
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True

    def _next(self, gpu: OnAccelerator | None) -> Unit | None:
        """The next unit; half of it where a GPU has no memory for the whole and the method lets it be cut."""
        with self._lock:
            if not self._units:
                return None
            unit = self._units.popleft()
            step = PIECE // unit.task.dtype.itemsize
            while gpu and self._is_cut(unit, step) and not gpu.fits(unit):
                unit, rest = unit.halves(step)
                self._units.appendleft(rest)
            return unit

    def _is_cut(self, unit: Unit, step: int) -> bool:
        mergeable = unit.task.settings is not None and not isinstance(unit, Measurement)
        return mergeable and unit.task.elementwise and unit.stop - unit.start > step

    # -- one unit -----------------------------------------------------------------------------------------------

    def _run_unit(self, unit: Unit, gpu: OnAccelerator | None) -> bool:
        """Merge a unit, on the GPU where it is merged at all and fits; say whether it is done, else it is due again."""
        where = gpu if gpu and unit.task.settings is not None and gpu.fits(unit) else self._host
        try:
            with where.reserved(unit):
                work = self._measure_unit if isinstance(unit, Measurement) else self._merge_unit
                work(unit, where)
            return True
        except Exception as error:
            if where is not gpu or not is_out_of_memory(error):
                raise
        # the error is gone here, and with it the tensors its frames held
        gpu.accelerator.shrink(gpu.needed(unit))
        with self._lock:
            self._units.appendleft(unit)
        return False

    def _measure_unit(self, unit: "Measurement", where: OnHost | OnAccelerator) -> None:
        with where.held(unit) as (base, experts, _):
            unit.statistics[unit.task.name] = self.plan.measure(unit.task, base, experts)

    def _merge_unit(self, unit: Unit, where: OnHost | OnAccelerator) -> None:
        task = unit.task
        with where.held(unit) as (base, experts, out):
            self.plan.merge(task, base, experts, out)
            if self.check_finite and is_float(task.dtype) and not all_finite(out):
                self._note_nonfinite(unit, base, experts)
                return
            extraction = self.extraction if task.settings is not None else None
            cut = extraction.cut(task, base, out, experts) if extraction else None
            if self.check_finite and cut and not all(map(all_finite, cut.floats)):
                self._note_nonfinite(unit, base, experts)
                return
            record = extraction.write(task, cut) if extraction else {}
            pieces = self._pieces(task)
            where.store(unit, out, partial(_hash, pieces, task))
        if pieces and self._is_complete(task, pieces):
            self.sink.finish(task.name, {"checksum": pieces.hexdigest(), **record})

    def _pieces(self, task: TensorTask) -> PieceChecksum | None:
        if not self.sink.keeps_checksums:
            return None
        with self._lock:
            return self._checksums.setdefault(task.name, PieceChecksum(task.nbytes))

    def _is_complete(self, task: TensorTask, pieces: PieceChecksum) -> bool:
        """Whether all of the tensor has come; true once."""
        with self._lock:
            return pieces.complete and self._checksums.pop(task.name, None) is not None

    def _copy_tied(self, task: TensorTask) -> None:
        tensor = self.sink.tie(task.name, task.match.same_as)
        if self.sink.keeps_checksums:
            self.sink.finish(task.name, {"checksum": checksum(tensor)})
        self.progress.add(task, 1.0)

    def _note_nonfinite(self, unit: Unit, base: Array, experts: list[Array | None]) -> None:
        problem = self.plan.why_not_finite(unit.task, base, experts)
        with self._lock:
            if problem not in self._problems:
                self._problems.append(problem)
            self._stop |= len(self._problems) >= MOST_PROBLEMS


def _lanes(accelerator: Accelerator, accelerators: Sequence[Accelerator]) -> int:
    """How many threads serve it: as many as it can use, while there are cores for them."""
    return max(2, min(accelerator.lanes, (dispatch.threads() + 1) // len(accelerators)))


def _hash(pieces: PieceChecksum | None, task: TensorTask, first_element: int, array: Array) -> None:
    if pieces:
        pieces.update(first_element * task.dtype.itemsize, array)


@dataclass(frozen=True)
class Measurement(Unit):
    """A tensor that is looked at; what is found goes into `statistics`, by name."""

    statistics: dict[str, np.ndarray]


class _Progress:
    def __init__(self, plan: Plan, tell: Callable | None):
        self._plan, self._tell = plan, tell
        surveyed = plan.method.sweeps * sum(map(plan.bytes_read, plan.measured))
        self._total = plan.bytes_in + plan.bytes_out + surveyed
        self._done = 0.0
        self._lock = threading.Lock()

    def add(self, task: TensorTask, share: float, *, written: bool = True) -> None:
        if self._tell is None:
            return
        with self._lock:
            self._done += share * (self._plan.bytes_read(task) + task.nbytes * written)
            self._tell(round(self._done), self._total)
