"""Memory for results: buffers that are used again, within one budget."""

import threading
from contextlib import contextmanager

import numpy as np

# A buffer is at least this large, so that tensors of similar size share one instead of each faulting in fresh pages.
SMALLEST = 4 << 20


class BufferPool:
    """Byte buffers whose sum, idle ones included, never exceeds `limit` bytes.

    `borrow(size)` waits until others have given back enough. A size above the limit is never granted: ask `fits` first.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._idle: list[np.ndarray] = []
        self._held = 0  # bytes of all buffers, idle or lent, and of reservations
        self._change = threading.Condition()

    def fits(self, size: int, beside: int = 0) -> bool:
        return _rounded(size) + beside <= self.limit

    @contextmanager
    def borrow(self, size: int, beside: int = 0):
        """Lend a uint8 array of `size` bytes, with `beside` more bytes set aside for memory taken elsewhere."""
        buffer = self._take(_rounded(size), beside)
        try:
            yield buffer[:size]
        finally:
            self._give_back(buffer, beside)

    def _take(self, size: int, beside: int) -> np.ndarray:
        with self._change:
            while True:
                kept = min((b for b in self._idle if b.nbytes >= size), key=lambda b: b.nbytes, default=None)
                if kept is not None and self._make_room(beside, sparing=kept):
                    self._idle = [b for b in self._idle if b is not kept]
                    self._held += beside
                    return kept
                if self._make_room(size + beside):
                    self._held += size + beside
                    return np.empty(size, np.uint8)
                self._change.wait()

    def _make_room(self, needed: int, sparing: np.ndarray | None = None) -> bool:
        """Drop idle buffers, smallest first, until `needed` more bytes fit; say whether they do."""
        for buffer in sorted((b for b in self._idle if b is not sparing), key=lambda b: b.nbytes):
            if self._held + needed <= self.limit:
                break
            self._idle = [b for b in self._idle if b is not buffer]
            self._held -= buffer.nbytes
        return self._held + needed <= self.limit

    def _give_back(self, buffer: np.ndarray, beside: int) -> None:
        with self._change:
            self._idle.append(buffer)
            self._held -= beside
            self._change.notify_all()


def _rounded(size: int) -> int:
    return max(SMALLEST, 1 << max(0, size - 1).bit_length()) if size < 64 << 20 else -(-size // (16 << 20)) * (16 << 20)
