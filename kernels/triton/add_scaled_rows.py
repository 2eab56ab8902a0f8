"""add_scaled_rows in Triton: elementwise, bound by memory; the line of an entry costs one division a program."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels.dot_products import Lines, lines_of
from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024


@triton.jit
def _add_scaled_rows_kernel(
    base,
    arrays,
    weights,
    out,
    n: tl.int64,
    width: tl.int64,
    lines: tl.int64,
    BY_COLUMN: tl.constexpr,
    LONG_ROWS: tl.constexpr,  # at least BLOCK: no more than two in a program
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    # all loads before the arithmetic, so that they are in flight together
    if base is not None:
        start = tl.load(base + first + i, mask=inside)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(arrays[t] + first + i, mask=inside),)

    row = first // width
    column = first - row * width  # of the first entry
    if LONG_ROWS:
        below = (i >= tl.minimum(width - column, BLOCK).to(tl.int32)).to(tl.int32)
    else:
        below = (column.to(tl.int32) + i) // tl.cast(width, tl.int32)
    line = row + below
    if BY_COLUMN:
        line = column + i - below * width
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        x = widen(loaded[t])
        if base is not None:
            x = x - widen(start)
        total += tl.load(weights + t * lines + line, mask=inside) * x.to(tl.float32)
    if base is not None:
        total = widen(start) + total
    tl.store(out + first + i, narrow(total, out.dtype.element_ty), mask=inside)


def add_scaled_rows(
    base: torch.Tensor | None, arrays: Sequence[torch.Tensor], weights: np.ndarray, lines: Lines, out: torch.Tensor
) -> None:
    n = out.numel()
    if n == 0:
        return
    base, target = loadable(base), storable(out, base)
    width = lines_of(out.shape, lines)[1]
    _add_scaled_rows_kernel[(triton.cdiv(n, BLOCK),)](
        base,
        tuple(map(loadable, arrays)),
        torch.tensor(weights, device=out.device),
        target,
        n,
        width,
        weights.shape[1],
        lines == "column",
        width >= BLOCK,
        len(arrays),
        BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
