"""Where a stream's results go: into the shards of a work directory, or into memory.

A sink has `done` (records of an interrupted run, by tensor), `records` (those and the new ones), `keeps_checksums`
(whether `finish` gets them; without, results on a GPU need never leave it), and:

    direct(name)  -> the memory a result belongs in (an array, or a tensor on a GPU), for the method to write there
                     itself; None where it has to be written
    map(name)     -> the same, in host memory, for a result too large for a buffer; asked only where direct is None
    write(name, first_element, array)    a run of elements, a NumPy array, from any thread
    read(name) -> array;  tie(name, other) -> array;  finish(name, record)
"""

from collections.abc import Callable

from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.kernels.array import Array, empty, numel
from freemerge.plan import Plan


class DiskSink:
    """Into preallocated shards; what is finished is noted in the work directory's journal."""

    keeps_checksums = True

    def __init__(self, work: WorkDir, writer: CheckpointWriter):
        self._work = work
        self.map, self.write, self.read = writer.map, writer.write, writer.read
        self.done: dict[str, dict] = {}
        self.records: dict[str, dict] = {}

    def resume(self, holds: Callable[[str, dict], bool]) -> None:
        """Take over what an interrupted run has finished, if it is there.

        After a power cut the journal may know of bytes that never reached the disk, so all of it is read again.
        """
        self._work.verify_done(
            lambda name, record: checksum(self.read(name)) == record["checksum"] and holds(name, record)
        )
        self.done, self.records = dict(self._work.done), dict(self._work.done)

    def direct(self, name: str) -> None:
        return None

    def tie(self, name: str, other: str) -> Array:
        tensor = self.read(other)
        self.write(name, 0, tensor)
        return tensor

    def finish(self, name: str, record: dict) -> None:
        self._work.record(name, record)
        self.records[name] = record


class MemorySink:
    """Into new arrays, `tensors` by name, where the base's lie; tied tensors are one array."""

    keeps_checksums = False

    def __init__(self, plan: Plan):
        self.tensors = {
            task.name: empty(task.shape, task.dtype, like=plan.base.read(task.name))
            for task in plan.tasks
            if not task.match.same_as
        }
        self.done, self.records = {}, {}
        self.direct = self.read = self.tensors.__getitem__

    def write(self, name: str, first_element: int, array: Array) -> None:
        tensor = self.tensors[name].reshape(-1)[first_element : first_element + numel(array)]
        tensor[...] = placed_like(array.reshape(-1), tensor)

    def tie(self, name: str, other: str) -> Array:
        self.tensors[name] = self.tensors[other]
        return self.tensors[name]

    def finish(self, name: str, record: dict) -> None:
        self.records[name] = record
