"""task_vector_statistics in Triton: one sweep over base and experts, partial sums in float64 registers.

The base is read once for all experts. Program p takes the tiles p, p + P, ...; P depends on the number of elements and
on dtypes only, and a second kernel adds the programs' sums in order: the result does not depend on the device.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, widen

ROWS = 128  # a thread each
MOST_PROGRAMS = 2048
MOST_EXPERTS = 8  # in one sweep: the sums of more do not fit in registers


@triton.jit
def _task_vector_statistics_kernel(
    base, experts, partial, n: tl.int64, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # a tile is [ROWS, COLUMNS]: COLUMNS neighbours, 16 bytes, are added within a thread: few registers for the sums
    lane = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = ()
    for _ in tl.static_range(3 * T):
        sums = sums + (tl.zeros([ROWS], tl.float64),)
    largest = ()
    for _ in tl.static_range(T):
        largest = largest + (tl.zeros([ROWS], tl.int32),)

    stride = tl.num_programs(0).to(tl.int64) * ROWS * COLUMNS
    # stages: the next tiles are on their way to shared memory while one is added
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS * COLUMNS, n, stride, num_stages=3):
        inside = first + lane < n
        if base is not None:
            start = tl.load(base + first + lane, mask=inside, other=0.0)
        loaded = ()
        for t in tl.static_range(T):
            loaded = loaded + (tl.load(experts[t] + first + lane, mask=inside, other=0.0),)
        new_sums = ()
        new_largest = ()
        for t in tl.static_range(T):
            x = widen(loaded[t])
            if base is not None:
                x = x - widen(start)
            x = x.to(tl.float32)
            wide = x.to(tl.float64)
            new_sums = new_sums + (
                sums[3 * t] + tl.sum(wide, axis=1),
                sums[3 * t + 1] + tl.sum(tl.abs(wide), axis=1),
                sums[3 * t + 2] + tl.sum(wide * wide, axis=1),
            )
            bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the magnitudes are, NaN last
            new_largest = new_largest + (tl.maximum(largest[t], tl.max(bits, axis=1)),)
        sums = new_sums
        largest = new_largest

    for t in tl.static_range(T):
        mine = partial + 4 * t * tl.num_programs(0) + tl.program_id(0)
        for k in tl.static_range(3):
            tl.store(mine + k * tl.num_programs(0), tl.sum(sums[3 * t + k], axis=0))
        top = tl.max(largest[t], axis=0).to(tl.float32, bitcast=True)
        tl.store(mine + 3 * tl.num_programs(0), top.to(tl.float64))


@triton.jit
def _add_partial_kernel(partial, result, programs, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(partial + which * programs + i, mask=i < programs, other=0.0)
    if which % 4 == 3:
        top = tl.max(x.to(tl.int64, bitcast=True), axis=0)  # not negative: ordered as the numbers are, NaN last
        tl.store(result + which, top.to(tl.float64, bitcast=True))
    else:
        tl.store(result + which, tl.sum(x, axis=0))


def task_vector_statistics(base: torch.Tensor | None, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    like = experts[0] if experts else base
    result = torch.zeros(len(experts), 4, dtype=torch.float64, device=like.device if like is not None else None)
    together = 1 if base is None else MOST_EXPERTS  # without a base they may differ in size
    for t in range(0, len(experts), together):
        _measure(base, experts[t : t + together], result[t : t + together])
    return result


def _measure(base: torch.Tensor | None, experts: Sequence[torch.Tensor], result: torch.Tensor) -> None:
    if experts[0].numel() == 0:
        return
    n, base, experts = experts[0].numel(), loadable(base), tuple(map(loadable, experts))
    columns = 16 // min(array.dtype.itemsize for array in (*experts, base) if array is not None)
    programs = min(triton.cdiv(n, ROWS * columns), MOST_PROGRAMS)
    partial = torch.empty(4 * len(experts) * programs, dtype=torch.float64, device=result.device)
    # products of float32 numbers are exact in float64, so that fused multiply-adds round as the CPU does
    _task_vector_statistics_kernel[(programs,)](
        base, experts, partial, n, len(experts), ROWS, columns, num_warps=4, enable_fp_fusion=True
    )
    _add_partial_kernel[(4 * len(experts),)](partial, result, programs, MOST_PROGRAMS, num_warps=4)
