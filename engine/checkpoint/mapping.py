"""Files mapped into memory, and what the kernel is told about them."""

import ctypes
import errno
import mmap
import sys
from pathlib import Path

import numpy as np

from freemerge.errors import UnavailableError

WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22  # linux/mman.h; POPULATE_READ since 5.14
SAMPLES = 16
PAGE = mmap.PAGESIZE

if sys.platform == "linux":
    _libc = ctypes.CDLL(None)  # and not mmap.madvise: that holds the interpreter's lock while the kernel reads
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
else:
    _libc = None


def map_file(path: Path) -> np.ndarray:
    """The bytes of `path`, read-only. They stay mapped, even if it is unlinked, until the last view of them goes."""
    for retry in (True, False):
        try:
            with open(path, "rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            if error.errno != errno.EMFILE or not (retry and _allow_more_files()):
                raise
    raise AssertionError("unreachable")


def _allow_more_files() -> bool:
    # Python's mappings each keep a descriptor, and ten experts of 190 shards exceed the usual soft limit.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        raise UnavailableError(f"more shards than the {hard} files a process may open here; raise `ulimit -n`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def prefetch(view: np.ndarray) -> None:
    """Have the pages of a contiguous view of a mapping ready: mapped if they are cached, else on their way from disk.

    Mapping cached pages ahead costs less than the faults it saves; advice to read what is cached costs more, and
    mapping what is not waits for the disk. So some pages are asked first (mincore says "cached" of all pages of other
    users' files).
    """
    if _libc is None or not view.nbytes:
        return
    start, length = _pages(view)
    _libc.madvise(start, length, POPULATE_READ if _is_cached(start, length) else WILLNEED)


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
    pages = {last * i // (SAMPLES - 1) for i in range(SAMPLES)}
    return all(
        _libc.mincore(start + page * PAGE, 1, ctypes.byref(answer)) == 0 and answer.value & 1 for page in sorted(pages)
    )
