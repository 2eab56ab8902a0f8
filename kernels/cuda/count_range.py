"""count_range in CUDA C++: Triton's histogram, which adds up votes for every bin, takes hundreds of instructions an
entry where there are 2048 of them; counters in shared memory take one or two.
"""

from collections.abc import Sequence

import numpy as np
import torch

from freemerge.kernels.cuda import _compile
from freemerge.kernels.cuda._elements import ELEMENTS, exact

THREADS, EACH = 512, 8  # of count_range.cu
MOST_BLOCKS = 512  # four a multiprocessor; each has fewer than 2^32 entries to count
SHARED_MEMORY = 32 << 10  # bytes, so that a multiprocessor has room for as many threads as it can run
MOST_BINS = 8192  # whose counters fit there


def count_range(
    base: torch.Tensor | None,
    expert: torch.Tensor,
    lows: Sequence[int],
    shifts: Sequence[int],
    bins: int,
    magnitudes: bool,
) -> torch.Tensor:
    counts = torch.zeros((len(lows), bins + 2), dtype=torch.int64, device=expert.device)
    if expert.numel() == 0:
        return counts
    base, expert = exact(base), exact(expert)
    for row, low, shift in zip(counts, lows, shifts, strict=True):
        outside = torch.zeros_like(row[:2])
        for first in range(0, bins, MOST_BINS):
            outside.zero_()
            part = row[1 + first : 1 + min(bins, first + MOST_BINS)]
            _count(base, expert, low + (first << shift), shift, magnitudes, part, outside)
            if first == 0:
                row[0] = outside[0]
        row[-1] = outside[1]
    return counts


def _count(base, expert, low: int, shift: int, magnitudes: bool, counts: torch.Tensor, outside: torch.Tensor) -> None:
    n, bins = expert.numel(), len(counts)
    defines = {"EXPERT": ELEMENTS[expert.dtype], "BASE": ELEMENTS[(expert if base is None else base).dtype]}
    ways = max(1, min(8, SHARED_MEMORY // (4 * bins)))
    numbers = (np.int64(n), np.uint32(low), *map(np.int32, (shift, bins, magnitudes, ways)))
    blocks = min(-(-n // (THREADS * EACH)), MOST_BLOCKS)
    kernel = _compile.load("count_range.cu", "count_range", defines)
    kernel.launch((blocks,), THREADS, (base, expert, *numbers, counts, outside), 4 * ways * bins + 8 * THREADS)
