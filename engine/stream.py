"""Run a plan: read ahead, merge, write, all at once, within a memory limit. The only place with threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from freemerge.buffers import BufferPool
from freemerge.checkpoint.checksum import PIECE, PieceChecksum, checksum
from freemerge.errors import CheckpointError, listed
from freemerge.kernels import dispatch
from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import Array, is_float
from freemerge.plan import Plan, TensorTask

READ_AHEAD = 512 << 20  # bytes of input asked for before they are needed
BESIDE_BUFFERS = 256 << 20  # of the memory limit: the interpreter, its libraries, small arrays
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Unit:
    """A run of elements of one tensor, merged and written at once; all of them unless its method works by element."""

    task: TensorTask
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.task.size


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
    """

    def __init__(
        self, plan: Plan, sink, *, extraction=None, max_memory: int, check_finite=True, progress: Callable | None = None
    ):
        self.plan, self.sink, self.extraction = plan, sink, extraction
        self.check_finite = check_finite
        self.buffers = BufferPool(max(max_memory - BESIDE_BUFFERS, max_memory // 2))
        self.progress = _Progress(plan, progress)
        self._units: deque[Unit] = deque()
        self._checksums: dict[str, PieceChecksum] = {}
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        self._problems: list[str] = []

    def run(self) -> None:
        todo = [task for task in self.plan.tasks if task.name not in self.sink.done]
        for task in self.plan.tasks:
            if task.name in self.sink.done:
                self.progress.add(task, 1.0)
        self._units.extend(unit for task in todo if not task.match.same_as for unit in self._split(task))
        self._run_threads(todo)
        for task in todo:
            if task.match.same_as:
                self._copy_tied(task)
        if self.extraction:
            self.extraction.finish()

    def _split(self, task: TensorTask) -> Iterator[Unit]:
        if task.settings is not None and self.plan.method.scope != "element":
            yield Unit(task, 0, task.size)
            return
        step = PIECE // task.dtype.itemsize
        for start in range(0, max(task.size, 1), step):
            yield Unit(task, start, min(task.size, start + step))

    # -- threads ------------------------------------------------------------------------------------------------

    def _run_threads(self, todo: list[TensorTask]) -> None:
        ahead = _ReadAhead(self.plan, [task for task in todo if not task.match.same_as])
        # More workers than cores: while one waits for the disk or hashes, the ops of another use the pool of threads.
        workers = [
            threading.Thread(target=self._work, args=(ahead,), daemon=True)
            for _ in range(min(4, dispatch.threads() + 1))
        ]
        for thread in (ahead, *workers):
            thread.start()
        try:
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

    def _work(self, ahead: "_ReadAhead") -> None:
        try:
            while not self._stop:
                with self._lock:
                    if not self._units:
                        return
                    unit = self._units.popleft()
                ahead.reached(unit.task)
                self._run_unit(unit)
                self.progress.add(unit.task, (unit.stop - unit.start) / max(1, unit.task.size))
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True

    # -- one unit -----------------------------------------------------------------------------------------------

    def _run_unit(self, unit: Unit) -> None:
        task = unit.task
        base, experts = self._inputs(unit)
        with self._output(unit) as out:
            self.plan.merge(task, base, experts, out)
            if self.check_finite and is_float(out.dtype) and not all_finite(out):
                self._note_nonfinite(unit, base, experts)
                return
            record = (
                self.extraction.extract(task, base, out, experts)
                if self.extraction and task.settings is not None
                else {}
            )
            whole = self._add_to_checksum(unit, out)
        if whole:
            self.sink.finish(task.name, {"checksum": whole, **record})

    def _inputs(self, unit: Unit) -> tuple[Array, list[Array | None]]:
        task, plan = unit.task, self.plan
        base = plan.base.read(task.name)
        experts = plan.read_experts(task) if task.settings is not None else []
        if unit.whole:
            return base, experts
        part = slice(unit.start, unit.stop)
        return base.reshape(-1)[part], [None if expert is None else expert.reshape(-1)[part] for expert in experts]

    @contextmanager
    def _output(self, unit: Unit) -> Iterator[Array]:
        """Memory for the result of a unit; on the way out it is written, if it is not where it belongs already."""
        task = unit.task
        shape = task.shape if unit.whole else (unit.stop - unit.start,)
        size = (unit.stop - unit.start) * task.dtype.itemsize
        direct = self.sink.direct(task.name)
        if direct is None and not self.buffers.fits(size, task.workspace):
            direct = self.sink.map(task.name)
        if direct is not None:
            yield direct.reshape(-1)[unit.start : unit.stop].reshape(shape)
            return
        with self.buffers.borrow(size, beside=task.workspace) as buffer:
            out = buffer.view(task.dtype).reshape(shape)
            yield out
            self.sink.write(task.name, unit.start, out)

    def _add_to_checksum(self, unit: Unit, out: Array) -> str | None:
        """The checksum of the unit's tensor, once, when its last piece has come."""
        task = unit.task
        with self._lock:
            pieces = self._checksums.setdefault(task.name, PieceChecksum(task.nbytes))
        pieces.update(unit.start * task.dtype.itemsize, out)
        with self._lock:
            if not pieces.complete or self._checksums.pop(task.name, None) is None:
                return None
        return pieces.hexdigest()

    def _copy_tied(self, task: TensorTask) -> None:
        tensor = self.sink.tie(task.name, task.match.same_as)
        self.sink.finish(task.name, {"checksum": checksum(tensor)})
        self.progress.add(task, 1.0)

    def _note_nonfinite(self, unit: Unit, base: Array, experts: list[Array | None]) -> None:
        inputs = [
            (self.plan.base.label, base),
            *((e.label, a) for e, a in zip(self.plan.experts, experts, strict=False)),
        ]
        guilty = [label for label, array in inputs if array is not None and not all_finite(array)]
        found = f"NaN or Inf in {', '.join(guilty)}" if guilty else f"the result does not fit {unit.task.dtype}"
        problem = f"{unit.task.name}: {found}"
        with self._lock:
            if problem not in self._problems:
                self._problems.append(problem)
            self._stop |= len(self._problems) >= MOST_PROBLEMS


class _ReadAhead(threading.Thread):
    """Asks for the inputs of coming tasks, READ_AHEAD bytes in front of the workers."""

    def __init__(self, plan: Plan, tasks: list[TensorTask]):
        super().__init__(daemon=True)
        self._plan, self._tasks = plan, tasks
        self._reached = 0
        self._starts = {}
        self._change = threading.Condition()
        self._stopped = False

    def run(self) -> None:
        asked = 0
        for task in self._tasks:
            with self._change:
                self._starts[task.name] = asked
                while not self._stopped and asked - self._reached > READ_AHEAD:
                    self._change.wait()
                if self._stopped:
                    return
            asked += self._ask(task)

    def _ask(self, task: TensorTask) -> int:
        plan = self._plan
        wanted = [(plan.base, task.name)] if plan.method.uses_base or task.settings is None else []
        if task.settings is not None:
            wanted += [
                (expert, source) for expert, source in zip(plan.experts, task.match.sources, strict=True) if source
            ]
        for checkpoint, name in wanted:
            checkpoint.prefetch(name)
        return plan.bytes_read(task)

    def reached(self, task: TensorTask) -> None:
        with self._change:
            self._reached = max(self._reached, self._starts.get(task.name, 0))
            self._change.notify_all()

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()


class _Progress:
    def __init__(self, plan: Plan, tell: Callable | None):
        self._plan, self._tell = plan, tell
        self._total = plan.bytes_in + plan.bytes_out
        self._done = 0.0
        self._lock = threading.Lock()

    def add(self, task: TensorTask, share: float) -> None:
        if self._tell is None:
            return
        with self._lock:
            self._done += share * (self._plan.bytes_read(task) + task.nbytes)
            self._tell(round(self._done), self._total)
