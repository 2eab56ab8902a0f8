"""count_digits in CUDA C++: Triton's histogram, which adds up votes for every bin, takes hundreds of instructions an
entry where there are 2048 of them; counters in shared memory take one or two.
"""

import numpy as np
import torch

from freemerge.kernels.cuda import _compile
from freemerge.kernels.cuda._elements import ELEMENTS, exact

THREADS, EACH = 512, 8  # of count_digits.cu
MOST_BLOCKS = 512  # four a multiprocessor; each has fewer than 2^32 entries to count
SHARED_MEMORY = 32 << 10  # bytes, so that a multiprocessor has room for as many threads as it can run
MOST_BITS = 13  # whose counters fit there


def count_digits(
    base: torch.Tensor | None, expert: torch.Tensor, found: int, below: int, width: int, magnitudes: bool
) -> torch.Tensor:
    counts = torch.zeros(1 << width, dtype=torch.int64, device=expert.device)
    if expert.numel() == 0:
        return counts
    base, expert = exact(base), exact(expert)
    part = min(width, MOST_BITS)
    found = found >> (below + width) << width  # above the digit
    for upper, parts in enumerate(counts.view(-1, 1 << part)):
        _count(base, expert, (found | upper << part) << below, below, part, magnitudes, parts)
    return counts


def _count(base, expert, found: int, below: int, width: int, magnitudes: bool, counts: torch.Tensor) -> None:
    n = expert.numel()
    defines = {"EXPERT": ELEMENTS[expert.dtype], "BASE": ELEMENTS[(expert if base is None else base).dtype]}
    ways = min(8, SHARED_MEMORY >> (width + 2))
    numbers = (np.int64(n), np.uint32(found), *map(np.int32, (below, width, magnitudes, ways)))
    blocks = min(-(-n // (THREADS * EACH)), MOST_BLOCKS)
    kernel = _compile.load("count_digits.cu", "count_digits", defines)
    kernel.launch((blocks,), THREADS, (base, expert, *numbers, counts), 4 * ways << width)
