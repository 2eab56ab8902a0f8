"""Files mapped into memory, and what the kernel is told about them."""

import ctypes
import errno
import mmap
import sys
from pathlib import Path

import numpy as np

from freemerge.errors import UnavailableError

WILLNEED, DONTNEED = 3, 4  # linux/mman.h
PAGE = mmap.PAGESIZE

if sys.platform == "linux":
    _libc = ctypes.CDLL(None)  # and not mmap.madvise: that holds the interpreter's lock while the kernel reads
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
else:
    _libc = None


def map_file(path: Path) -> np.ndarray:
    """The bytes of `path`, read-only. They stay mapped, even if it is unlinked, until the last view of them goes."""
    try:
        return _map(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _allow_more_files()
    return _map(path)


def _map(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _allow_more_files() -> None:
    # Python's mappings each keep a descriptor, and ten experts of 190 shards exceed the usual soft limit.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        raise UnavailableError(f"more shards than the {hard} files a process may open here; raise `ulimit -n`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prefetch(view: np.ndarray) -> None:
    """Set the pages of a contiguous view of a mapping on their way from the disk, unless they are cached.

    Three pages are asked for all, as advice about cached pages costs a tenth of reading them (Linux 6.18; mincore says
    "cached" of all pages of other users' files). Cached pages are not mapped ahead: MADV_POPULATE_READ took longer than
    the faults it saves, twice as long where the cache holds single pages.
    """
    if _libc is None or not view.nbytes:
        return
    start, length = _pages(view)
    if not _is_cached(start, length):
        _libc.madvise(start, length, WILLNEED)


def release(view: np.ndarray) -> None:
    """Take the pages of a contiguous view of a mapping out of this process; the file's cache keeps them."""
    if _libc is not None and view.nbytes:
        _libc.madvise(*_pages(view), DONTNEED)


def _pages(view: np.ndarray) -> tuple[int, int]:
    address = view.__array_interface__["data"][0]
    start = address // PAGE * PAGE
    return start, address + view.nbytes - start


def _is_cached(start: int, length: int) -> bool:
    answer = ctypes.c_ubyte()
    last = (length - 1) // PAGE
    for page in {0, last // 2, last}:
        if _libc.mincore(start + page * PAGE, 1, ctypes.byref(answer)) != 0 or not answer.value & 1:
            return False
    return True
