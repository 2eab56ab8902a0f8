"""fusion_importance in Triton: a program a row (or a few short ones), which it reads again and again out of the cache.

Bound by float64 arithmetic: four exponentials and a logarithm an entry.
"""

import torch
import triton
import triton.language as tl

from freemerge.kernels.array import rows_of
from freemerge.kernels.fusion_importance import FLOOR
from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits, widen

TILE = 1024


@triton.jit
def _load(array, offsets, inside):
    return widen(tl.load(array + offsets, mask=inside, other=float("-inf"))).to(tl.float32)


@triton.jit
def _powers(array, largest, offsets, inside):
    """exp(x - largest), 0 outside."""
    power = tl.exp(_load(array, offsets, inside).to(tl.float64) - largest[:, None].to(tl.float64))
    return tl.where(inside, power, 0.0)


@triton.jit
def _fusion_importance_kernel(
    base,
    expert,
    out,
    rows: tl.int64,
    width: tl.int64,
    FLOOR: tl.constexpr,  # an argument would be float32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = (row < rows)[:, None]
    starts = (row * width)[:, None]

    # a lane of a tile has a number of its own to the end: nothing is exchanged in a loop
    before_lanes = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    after_lanes = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for first in range(0, width, COLUMNS):
        offsets = starts + first + column[None, :]
        inside = here & (first + column < width)[None, :]
        before_lanes = tl.maximum(before_lanes, _load(base, offsets, inside))
        after_lanes = tl.maximum(after_lanes, _load(expert, offsets, inside))
    before_largest = tl.max(before_lanes, axis=1)
    after_largest = tl.max(after_lanes, axis=1)

    before_sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    after_sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, width, COLUMNS):
        offsets = starts + first + column[None, :]
        inside = here & (first + column < width)[None, :]
        before_sums += _powers(base, before_largest, offsets, inside)
        after_sums += _powers(expert, after_largest, offsets, inside)
    before_sum = tl.sum(before_sums, axis=1)[:, None]
    after_sum = tl.sum(after_sums, axis=1)[:, None]

    terms = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, width, COLUMNS):
        offsets = starts + first + column[None, :]
        inside = here & (first + column < width)[None, :]
        p = _powers(expert, after_largest, offsets, inside) / after_sum + FLOOR
        q = _powers(base, before_largest, offsets, inside) / before_sum + FLOOR
        terms += tl.where(inside, p * tl.log(p / q), 0.0)
    divergence = tl.sum(terms, axis=1)
    factor = tl.where(divergence < 0, 0.0, divergence).to(tl.float32)[:, None]

    for first in range(0, width, COLUMNS):
        offsets = starts + first + column[None, :]
        inside = here & (first + column < width)[None, :]
        bits = magnitude_bits(load_task_vector(base, expert, offsets, inside))
        tl.store(out + offsets, bits.to(tl.float32, bitcast=True) * factor, mask=inside)


def fusion_importance(base: torch.Tensor, expert: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    rows, width = rows_of(out.shape)
    columns = min(TILE, triton.next_power_of_2(width))
    together = TILE // columns
    _fusion_importance_kernel[(triton.cdiv(rows, together),)](
        loadable(base), loadable(expert), out, rows, width, FLOOR, together, columns, num_warps=4
    )
