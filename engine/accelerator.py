"""One GPU: a budget of its memory, and the way of arrays to it and back.

torch is imported by whoever finds the GPU (devices.py).
"""

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from freemerge.checkpoint.torch_arrays import flat_bytes
from freemerge.kernels.array import Array, dtype_of, is_tensor, torch_dtype

SHARE = 0.8  # of the memory that is free on a GPU, where no limit is given
INTERPRETER_MEMORY = 1 << 30
CHUNK = 8 << 20  # bytes of one copy to or from a GPU; a lane has two such chunks of page-locked memory
LANES = 8  # threads a GPU: one copies 6 to 10 GB/s out of the page cache, a bus takes 25 to 55


class Accelerator:
    """A GPU, and a budget of its memory that whoever uses it shares.

    Attributes:
        device: the torch device.
        name: of the hardware.
        limit: bytes that may be reserved at a time.
        lanes: how many threads can keep it busy at once.
    """

    def __init__(self, device, name: str, limit: int, *, lanes: int):
        self.device, self.name, self.limit, self.lanes = device, name, limit, lanes
        self._held = self._largest = 0
        self._change = threading.Condition()
        self._taken_before = self._taken()

    @classmethod
    def cuda(cls, device, limit: int | None = None) -> "Accelerator":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return cls(device, torch.cuda.get_device_name(device), limit or int(SHARE * free), lanes=LANES)

    @classmethod
    def interpreter(cls, limit: int | None = None) -> "Accelerator":
        import torch

        return cls(torch.device("cpu"), "Triton's interpreter", limit or INTERPRETER_MEMORY, lanes=2)

    def __str__(self) -> str:
        return f"{self.device} ({self.name})"

    def lane(self, chunk: int = CHUNK) -> "Lane":
        """A way there and back, for one thread; it takes 2 * `chunk` bytes of page-locked memory."""
        return Lane(self, chunk)

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.limit

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Set `nbytes` of its memory aside, waiting until others have given back enough; ask `fits` first."""
        with self._change:
            # the limit may shrink meanwhile: what no longer fits then goes alone
            self._change.wait_for(lambda: self._held + nbytes <= self.limit or not self._held)
            self._held += nbytes
            self._largest = max(self._largest, nbytes)
        if self._overflows():
            self.empty_cache()
        try:
            yield
        finally:
            with self._change:
                self._held -= nbytes
                self._change.notify_all()

    def shrink(self, nbytes: int) -> None:
        """Memory ran out with `nbytes` reserved, given back by now: reserve less at a time from now on.

        With others at work, fewer of them; alone, never as much again.
        """
        with self._change:
            others = self._held
            self.limit = min(self.limit, max(nbytes, (nbytes + others) // 2) if others else nbytes - 1)
        self.empty_cache()

    def empty_cache(self) -> None:
        """Give memory that torch keeps for later back to the device; CuPy launches kernels and holds none."""
        if self.device.type == "cuda":
            sys.modules["torch"].cuda.empty_cache()

    def _overflows(self) -> bool:
        """Whether torch keeps too much: what is freed it keeps for the stream, and so for the lane, that freed it."""
        at_most = 2 * self._largest * self.lanes  # asking takes longer than thinking
        return at_most > self.limit and self._taken() - self._taken_before > self.limit

    def _taken(self) -> int:
        return sys.modules["torch"].cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0


class Lane:
    """One thread's way to an accelerator and back: a stream, and two chunks of page-locked memory.

    While one chunk flies the other is filled, or emptied. On the CPU, for the interpreter, it is the same without
    streams.
    """

    def __init__(self, accelerator: Accelerator, chunk: int = CHUNK):
        self.device = accelerator.device
        self._torch = sys.modules["torch"]
        cuda = self.device.type == "cuda"
        self._stream = self._torch.cuda.Stream(self.device) if cuda else None
        self._size = chunk
        with self._torch.cuda.device(self.device) if cuda else nullcontext():  # no memory is taken on another GPU
            self._chunks = itertools.cycle([_Chunk(chunk, cuda) for _ in range(2)])

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let torch and the ops use this lane's stream; on the way out all of it is done."""
        if self._stream is None:
            yield
            return
        with self._torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype):
        return self._torch.empty(shape, dtype=torch_dtype(dtype), device=self.device)

    def upload(self, array: Array):
        """A tensor on the device with the elements of a contiguous array; a tensor already there is that tensor.

        On its way when this returns: whatever comes next on the lane's stream finds it there.
        """
        if is_tensor(array):
            return array if array.device == self.device else array.to(self.device, non_blocking=True)
        tensor = self.empty(array.shape, array.dtype)
        source, target = flat_bytes(array), flat_bytes(tensor)
        for start in range(0, source.size, self._size):
            part = source[start : start + self._size]
            chunk = next(self._chunks)
            chunk.wait()
            np.copyto(chunk.array[: part.size], part)
            target[start : start + part.size].copy_(chunk.tensor[: part.size], non_blocking=True)
            chunk.fly()
        return tensor

    def download(self, tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of a contiguous tensor's elements in order, each with the number of its first; valid until the next."""
        dtype = dtype_of(tensor)
        source = flat_bytes(tensor)
        step = self._size // dtype.itemsize * dtype.itemsize
        before = None
        for start in range(0, source.numel(), step):
            part = source[start : start + step]
            chunk = next(self._chunks)
            chunk.wait()
            chunk.tensor[: part.numel()].copy_(part, non_blocking=True)
            chunk.fly()
            if before is not None:
                yield before[0].landed(*before[1:], dtype)
            before = chunk, start, part.numel()
        if before is not None:
            yield before[0].landed(*before[1:], dtype)


class _Chunk:
    """Page-locked memory for one copy at a time, and when that is over."""

    def __init__(self, nbytes: int, cuda: bool):
        torch = sys.modules["torch"]
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        self.array = self.tensor.numpy()
        # blocking: a thread that waits leaves its core to those that copy
        self._event = torch.cuda.Event(blocking=True) if cuda else None

    def fly(self) -> None:
        """A copy has just been put on the current stream."""
        if self._event:
            self._event.record()

    def wait(self) -> None:
        """Until the last copy is over."""
        if self._event:
            self._event.synchronize()

    def landed(self, start: int, nbytes: int, dtype: np.dtype) -> tuple[int, np.ndarray]:
        self.wait()
        return start // dtype.itemsize, self.array[:nbytes].view(dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a GPU's memory ran out: torch, CuPy, Triton and the driver have each their own way."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
