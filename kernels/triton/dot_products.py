"""dot_products in Triton: sums in float64 registers, a few vectors against a few others at a time.

The entries of a line are added in an order that depends on shapes only: P programs take its tiles p, p + P, ..., and a
second kernel adds what they found. The matrices go to the host, which makes coefficients of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels.dot_products import Lines, lines_of
from freemerge.kernels.triton._convert import loadable, widen

THREADS = 128
GROUP = 3  # vectors against vectors: at most 9 sums a thread
MOST_PROGRAMS = 2048


@triton.jit
def _task_vectors(base, arrays, offsets, inside, T: tl.constexpr):
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(arrays[t] + offsets, mask=inside, other=0.0),)
    vectors = ()
    for t in tl.static_range(T):
        x = widen(loaded[t])
        if base is not None:
            x = x - widen(tl.load(base + offsets, mask=inside, other=0.0))
        vectors = vectors + (x.to(tl.float32).to(tl.float64),)
    return vectors


@triton.jit
def _dot_products_kernel(
    base,
    left,
    right,  # None: `left` again
    partial,
    lines: tl.int64,
    length: tl.int64,
    along: tl.int64,  # from one entry of a line to the next
    across: tl.int64,  # from one line to the next
    row,
    column,
    total,  # vectors there are
    S: tl.constexpr,
    T: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """`partial`: float64 [parts, lines, total, total], of which this writes S rows and T columns, and their mirror."""
    # a tile is [LINES, ENTRIES, TOGETHER]: TOGETHER neighbours are added within a thread
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    entry = tl.arange(0, ENTRIES)[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    sums = ()
    for _ in tl.static_range(S * T):
        sums = sums + (tl.zeros([LINES, ENTRIES], tl.float64),)
    step = tl.num_programs(1).to(tl.int64) * (ENTRIES * TOGETHER)
    for first in range(tl.program_id(1).to(tl.int64) * (ENTRIES * TOGETHER), length, step):
        inside = (line < lines)[:, None, None] & (first + entry < length)[None, :, :]
        offsets = (line * across)[:, None, None] + ((first + entry) * along)[None, :, :]
        mine = _task_vectors(base, left, offsets, inside, S)
        others = mine
        if right is not None:
            others = _task_vectors(base, right, offsets, inside, T)
        new_sums = ()
        for s in tl.static_range(S):
            for t in tl.static_range(T):
                if right is None and t < s:
                    new_sums = new_sums + (sums[s * T + t],)
                else:
                    new_sums = new_sums + (sums[s * T + t] + tl.sum(mine[s] * others[t], axis=2),)
        sums = new_sums
    matrix = partial + (tl.program_id(1) * lines + line) * total * total
    for s in tl.static_range(S):
        for t in tl.static_range(T):
            if right is not None or t >= s:
                found = tl.sum(sums[s * T + t], axis=1)
                tl.store(matrix + (row + s) * total + column + t, found, mask=line < lines)
                tl.store(matrix + (column + t) * total + row + s, found, mask=line < lines)


@triton.jit
def _add_parts_kernel(partial, result, parts, numbers: tl.int64, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mine = tl.load(partial + i * numbers + number, mask=i < parts, other=0.0)
    tl.store(result + number, tl.sum(mine, axis=0))


def dot_products(base: torch.Tensor | None, arrays: Sequence[torch.Tensor], lines: Lines) -> np.ndarray:
    rows, width = lines_of(arrays[0].shape, lines)
    by_column = lines == "column"
    count, length = (width, rows) if by_column else (rows, width)
    if count * length == 0:
        return np.zeros((count, len(arrays), len(arrays)))
    tile = _tile(count, length, by_column)
    parts = max(1, min(triton.cdiv(length, tile[1] * tile[2]), MOST_PROGRAMS // triton.cdiv(count, tile[0])))
    partial = torch.empty((parts, count, len(arrays), len(arrays)), dtype=torch.float64, device=arrays[0].device)
    base, arrays = loadable(base), tuple(map(loadable, arrays))
    steps = (width, 1) if by_column else (1, width)
    for row in range(0, len(arrays), GROUP):
        for column in range(row, len(arrays), GROUP):
            left, right = arrays[row : row + GROUP], arrays[column : column + GROUP]
            # products of float32 numbers are exact in float64, so that fused multiply-adds round as the CPU does
            _dot_products_kernel[(triton.cdiv(count, tile[0]), parts)](
                base,
                left,
                None if row == column else right,
                partial,
                count,
                length,
                *steps,
                row,
                column,
                len(arrays),
                len(left),
                len(right),
                *tile,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return _added(partial).cpu().numpy()


def _tile(count: int, length: int, by_column: bool) -> tuple[int, int, int]:
    """LINES, ENTRIES, TOGETHER: a thread for each of LINES * ENTRIES, neighbours in memory side by side."""
    if by_column:
        lines = min(THREADS, triton.next_power_of_2(count))
        return lines, THREADS // lines, 8
    padded = triton.next_power_of_2(length)
    together = min(8, padded)
    entries = min(THREADS, padded // together)
    return THREADS // entries, entries, together


def _added(partial: torch.Tensor) -> torch.Tensor:
    if len(partial) == 1:
        return partial[0]
    result = torch.empty_like(partial[0])
    block = triton.next_power_of_2(len(partial))
    _add_parts_kernel[(result.numel(),)](partial, result, len(partial), result.numel(), block, num_warps=4)
    return result
