"""The numbers csrc/cuda/transform.h is compiled with and fed: threads, roots of unity, where a frequency comes out."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from freemerge.kernels._high_pass_gpu_plan import LARGEST_RADIX, SHARED_MEMORY, point_bytes, radices

THREADS, REGISTERS = 2048, 65536  # of a multiprocessor, on sm_80, sm_90 and sm_100
RESERVED = 1024  # bytes of shared memory each block takes for itself; one block leaves no others


@dataclass(frozen=True)
class Transform:
    """A transform of n complex points by one block.

    Attributes:
        radices: their product is n; the passes of the forward transform in order.
        threads: of a block.
        blocks: at least so many run on a multiprocessor at once; the compiler limits registers to that.
    """

    n: int
    radices: tuple[int, ...]
    threads: int
    blocks: int

    @property
    def defines(self) -> dict[str, object]:
        return {
            "N": self.n,
            "RADICES": ",".join(map(str, self.radices)),
            "THREADS": self.threads,
            "BLOCKS": self.blocks,
        }

    @property
    def shared_memory(self) -> int:
        """Bytes a block needs: its points, or at the end a double for each thread."""
        return max(point_bytes(self.n), 8 * self.threads)

    def passes(self) -> list[tuple[int, int]]:
        """(radix, distance of a butterfly's points) of each pass."""
        strides = self.n // np.cumprod(self.radices)
        return list(zip(self.radices, strides.tolist(), strict=True))

    def table(self) -> np.ndarray:
        """[roots, 2] float32: all passes' twiddles as transform.h describes them; never empty."""
        turns = np.concatenate([*(_twiddles(radix, stride) for radix, stride in self.passes()), np.zeros(2)])
        return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1).astype(np.float32)

    def places(self, frequencies: np.ndarray) -> np.ndarray:
        """Where in shared memory each frequency comes out, int32."""
        at, rest = np.zeros(len(frequencies), np.int64), np.asarray(frequencies, np.int64)
        for radix, stride in self.passes():
            at += rest % radix * stride
            rest = rest // radix
        return self.swizzled(at).astype(np.int32)

    def swizzled(self, points: np.ndarray) -> np.ndarray:
        """Where in shared memory each point lies: spread over the banks, as transform.h says."""
        last = next((radix for radix in reversed(self.radices) if radix > 1), 1)
        return points ^ (points >> 4 & 15) ^ (points >> 3 & 8) if last % 2 == 0 else points


def _twiddles(radix: int, stride: int) -> np.ndarray:
    """The roots of one pass, as angles in turns; an even number of them."""
    once = -np.arange(stride) / (stride * radix)
    if radix > LARGEST_RADIX:
        turns = np.concatenate([np.outer(np.arange(1, radix), once).ravel(), np.arange(radix) / radix])
    elif radix == 1 or stride == 1:
        return np.zeros(0)
    elif radix <= 16 and stride <= 512:
        turns = np.outer(np.arange(1, radix // 2 * 2 + 1), once).reshape(-1, 2, stride).swapaxes(1, 2).ravel()
    else:
        turns = np.outer([1 << k for k in range((radix - 1).bit_length())], once).ravel()
    return np.resize(turns, -(-len(turns) // 2) * 2)


@lru_cache(maxsize=256)
def transform(n: int, shared_memory_bytes: int = SHARED_MEMORY) -> Transform:
    """The transform of length n where a block may have so much shared memory; `fits` says whether there is one."""
    factors = radices(n)
    # threads, for want of registers: each quarter of a multiprocessor has its own, given out by warps
    most = min(THREADS, 4 * 32 * (REGISTERS // (4 * 32) // _registers(factors)))
    fitting = max(1, (shared_memory_bytes + RESERVED) // (point_bytes(n) + RESERVED))

    def blocks(threads: int) -> int:
        return max(1, min(32, fitting, most // threads))

    def cost(threads: int) -> float:
        """Turns of the whole block, by the points each takes; with fewer threads at once, less overlaps."""
        turns = sum(-(-n // (radix * threads)) * radix for radix in factors if radix > 1)
        return turns * threads * (1 + 500 / (threads * blocks(threads)))

    smallest = max([32, *(-(-(radix // 2 + 1) // 32) * 32 for radix in factors)])
    threads = min(range(smallest, max(smallest, min(most // 32 * 32, 512)) + 1, 32), key=cost)
    return Transform(n, factors, threads, blocks(threads))


def _registers(factors: tuple[int, ...]) -> int:
    """What a thread needs so that nothing spills, as the compiler's reports show (tests/gpu/test_cuda_compiles.py)."""
    largest = max(radix for radix in factors if radix <= LARGEST_RADIX)
    if largest > 16:
        return 128 if largest <= 43 else 168
    # the first pass holds the base beside its points, the last multiplies them
    return 80 if max(factors[0], factors[-1]) >= 12 else 72
