"""Shards written in place: preallocated with their header, then filled by any thread in any order.

The bytes of every tensor are known to have room before work begins, so a full disk shows at once and not after an hour.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from freemerge.checkpoint.checksum import PIECE, PieceChecksum, as_bytes, checksum
from freemerge.checkpoint.layout import PlacedEntry, ShardPlan, index_json
from freemerge.errors import OutputError
from freemerge.sizes import readable_size

__all__ = ["INDEX", "PIECE", "CheckpointWriter", "PieceChecksum", "ShardWriter", "checksum"]

INDEX = "model.safetensors.index.json"
# Bytes of one call. Large ones make the kernel look for large runs of free pages, which are cold: on a virtual machine
# with Linux 6.18, 2.2 GB went out in 0.55 s by 256 KiB and in 6 s by 4 MiB.
_AT_ONCE = 256 << 10


class ShardWriter:
    """One file of a result. Opening keeps what an interrupted run wrote: the same plan puts it in the same place."""

    def __init__(self, folder: Path, plan: ShardPlan, *, fsync: bool):
        self.path = folder / plan.filename
        self.plan = plan
        self._fsync = fsync
        self._map: mmap.mmap | None = None
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._preallocate()
            self.write_at(0, plan.header)
        except BaseException:
            self.close()
            raise

    def _preallocate(self) -> None:
        with disk_errors(self.path, self.missing_bytes):
            if os.fstat(self._file).st_size != self.plan.nbytes:
                os.ftruncate(self._file, self.plan.nbytes)
            try:
                os.posix_fallocate(self._file, 0, self.plan.nbytes)
            except AttributeError:  # macOS
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # musl on a file system that cannot
                    raise

    def missing_bytes(self) -> int:
        """How much the file still has to take from the disk."""
        return max(0, self.plan.nbytes - os.fstat(self._file).st_blocks * 512)

    def write_at(self, offset: int, data) -> None:
        """Write a contiguous array or buffer at byte `offset` of the file, the interpreter lock released."""
        flat = as_bytes(data)
        # Linux writes to one file one at a time, and threads that wait for it spin: here they leave their core to
        # others.
        with self._writing, disk_errors(self.path, lambda: flat.size):
            while flat.size:
                written = os.pwrite(self._file, flat[:_AT_ONCE], offset)
                if written == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                flat, offset = flat[written:], offset + written

    def view(self, entry: PlacedEntry) -> np.ndarray:
        """A tensor of the file, writable, zero-copy."""
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self._file, self.plan.nbytes)
        return np.frombuffer(self._map, entry.dtype, prod(entry.shape), entry.offset).reshape(entry.shape)

    def finish(self) -> None:
        """Push the bytes to the disk unless told not to, and close the file; views stay valid."""
        if self._fsync:
            with disk_errors(self.path, lambda: 0):
                os.fsync(self._file)
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class CheckpointWriter:
    """All shards of a result and their index, by name of tensor."""

    def __init__(self, folder: Path, shards: Sequence[ShardPlan], *, fsync: bool = True):
        check_room(folder, shards)
        self._folder = folder
        self._shards: list[ShardWriter] = []
        try:
            for shard in shards:
                self._shards.append(ShardWriter(folder, shard, fsync=fsync))
        except BaseException:
            self.close()
            raise
        self._places = {entry.name: (shard, entry) for shard in self._shards for entry in shard.plan.entries}

    def write(self, name: str, first_element: int, array: np.ndarray) -> None:
        """Write `array`, contiguous, of the tensor's dtype, as its elements from `first_element` on.

        Any thread, any order, also at the same time. Raises OutputError where the disk is full.
        """
        shard, entry = self._places[name]
        if array.dtype != entry.dtype or not 0 <= first_element <= prod(entry.shape) - array.size:
            raise ValueError(
                f"{name} is {entry.dtype} {list(entry.shape)}; "
                f"{array.size} elements of {array.dtype} do not fit in at {first_element}"
            )
        shard.write_at(entry.offset + first_element * entry.dtype.itemsize, array)

    def map(self, name: str) -> np.ndarray:
        """The tensor in the file, writable, for results too large for a buffer in memory. Not after `finish`."""
        shard, entry = self._places[name]
        return shard.view(entry)

    def read(self, name: str) -> np.ndarray:
        """What has been written of the tensor, read-only, zero-copy."""
        array = self.map(name)
        array.flags.writeable = False
        return array

    def finish(self) -> None:
        """Write the index, where there are several shards, and push everything to the disk unless told not to."""
        plans = [shard.plan for shard in self._shards]
        if len(plans) > 1:
            write_file(self._folder / INDEX, index_json(plans))
        for shard in self._shards:
            shard.finish()

    def close(self) -> None:
        """Let go of the files as they are."""
        for shard in self._shards:
            shard.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def check_room(folder: Path, shards: Sequence[ShardPlan]) -> None:
    """Raise OutputError where the disk has no room for `shards`, counting what an interrupted run has already taken."""
    needed = 0
    for shard in shards:
        path = folder / shard.filename
        needed += max(0, shard.nbytes - (path.stat().st_blocks * 512 if path.exists() else 0))
    free = free_bytes(folder)
    if needed > free:
        raise OutputError(
            f"disk full: {folder} needs {readable_size(needed)} and has {readable_size(free)} free; "
            f"free {readable_size(needed - free)} or choose another output directory"
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole; raises OutputError where that fails."""
    with disk_errors(path, lambda: len(data)):
        path.write_bytes(data)


@contextmanager
def disk_errors(path: Path, missing_bytes):
    """Turn what the system says about a disk that takes no more into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "quota exceeded" if error.errno == errno.EDQUOT else "disk full"
            if error.errno == errno.EFBIG:
                reason = "file too large for this file system (a smaller --shard-size may help)"
            missing, free = readable_size(missing_bytes()), readable_size(free_bytes(path.parent))
            raise OutputError(
                f"{reason} while writing {path}: {missing} did not fit, {free} free; "
                "make room, then run the same command with --resume to continue"
            ) from error
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
