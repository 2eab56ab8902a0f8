"""The numbers csrc/cuda/transform.h is compiled with and fed: threads, roots of unity, where a frequency comes out."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from freemerge.kernels._high_pass_gpu_plan import LARGEST_RADIX, point_bytes, radices

MULTIPROCESSOR = 2048, 65536, 233_472  # threads, registers and bytes of shared memory it has, on sm_80 and later
RESERVED = 1024  # bytes of shared memory each block takes for itself


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
        """[roots, 2] float32: all passes' twiddles as transform.h describes them."""
        parts = []
        for radix, stride in self.passes():
            direct = radix > LARGEST_RADIX
            powers = range(1, radix) if direct else [1 << k for k in range((radix - 1).bit_length())]
            parts += [-np.arange(stride) * power / (stride * radix) for power in powers]
            if direct:
                parts.append(np.arange(radix) / radix)
        angles = 2 * np.pi * np.concatenate([*parts, [0.0]])  # the last so that no table is empty
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def places(self, frequencies: np.ndarray) -> np.ndarray:
        """Where in shared memory each frequency comes out, int32."""
        at, rest = np.zeros(len(frequencies), np.int64), np.asarray(frequencies, np.int64)
        for radix, stride in self.passes():
            at += rest % radix * stride
            rest = rest // radix
        swizzled = next((radix for radix in reversed(self.radices) if radix > 1), 1) % 2 == 0
        return (at ^ (at >> 4 & 15) if swizzled else at).astype(np.int32)


@lru_cache(maxsize=256)
def transform(n: int) -> Transform:
    """The transform of length n; `radices(n)` says whether there is one."""
    factors = radices(n)
    threads_there, registers, shared = MULTIPROCESSOR
    # threads, for want of registers: each quarter of a multiprocessor has its own, given out by warps
    most = 4 * 32 * (registers // (4 * 32) // _registers(factors))
    fitting = max(1, shared // (point_bytes(n) + RESERVED))

    def blocks(threads: int) -> int:
        return max(1, min(32, fitting, min(most, threads_there) // threads))

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
    return 80 if 16 in (factors[0], factors[-1]) else 72
