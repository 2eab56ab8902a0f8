"""unified_vector in Triton: one sweep over base and experts for the vector, the masks and their sums.

An expert's loaded entries stay in registers and are worked out anew for the sum, the maximum and the mask. Program p
takes the tiles p, p + P, ...; P depends on the number of entries only, and the programs' sums are added in order: the
result does not depend on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen
from freemerge.kernels.triton._masks import ROWS, entries, store_bits
from freemerge.kernels.triton.mask_statistics import MOST_PROGRAMS, _add_programs_kernel

MANY = 4  # experts; beyond, twice as many threads share a tile, so that up to 16 fit in registers


@triton.jit
def _unified_vector_kernel(base, experts, masks, out, partial, n: tl.int64, T: tl.constexpr, ROWS: tl.constexpr):
    lane = entries(ROWS)
    sums = ()
    for _ in tl.static_range(2 * T):
        sums = sums + (tl.zeros([ROWS], tl.float64),)
    stride = tl.num_programs(0).to(tl.int64) * (ROWS * 8)
    for first in range(tl.program_id(0).to(tl.int64) * (ROWS * 8), n, stride):
        inside = first + lane < n
        start = tl.load(base + first + lane, mask=inside, other=0.0)
        loaded = ()
        for t in tl.static_range(T):
            loaded = loaded + (tl.load(experts[t] + first + lane, mask=inside, other=0.0),)
        start = widen(start)

        total = tl.zeros([ROWS, 8], tl.float32)
        for t in tl.static_range(T):
            total += (widen(loaded[t]) - start).to(tl.float32)
        up = total > 0
        largest = tl.zeros([ROWS, 8], tl.float32)
        for t in tl.static_range(T):
            along = _along(start, loaded[t], up)
            largest = tl.where(along > largest, along, largest)  # a NaN is no larger
        largest = tl.where(total == total, largest, total)

        new_sums = ()
        for t in tl.static_range(T):
            along = _along(start, loaded[t], up)
            kept = tl.where(along > 0, largest, 0.0)
            new_sums = new_sums + (
                sums[2 * t] + tl.sum(tl.abs(along).to(tl.float64), axis=1),
                sums[2 * t + 1] + tl.sum(kept.to(tl.float64), axis=1),
            )
            store_bits(masks[t], first, n, (along > 0).to(tl.int32), ROWS)
        sums = new_sums
        unified = tl.where(up, largest, 0.0 - largest)  # never -0
        tl.store(out + first + lane, narrow(unified, out.dtype.element_ty), mask=inside)
    for k in tl.static_range(2 * T):
        tl.store(partial + k * tl.num_programs(0) + tl.program_id(0), tl.sum(sums[k], axis=0))


@triton.jit
def _along(start, expert, up):
    """The change of an expert, positive where it goes the way of the sum."""
    change = (widen(expert) - start).to(tl.float32)
    return tl.where(up, change, -change)


def unified_vector(
    base: torch.Tensor, experts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], out: torch.Tensor
) -> np.ndarray:
    n, count = base.numel(), len(experts)
    if n == 0:
        return np.zeros((count, 2))
    programs = min(triton.cdiv(n, ROWS * 8), MOST_PROGRAMS)
    partial = torch.empty(2 * count * programs, dtype=torch.float64, device=base.device)
    result = torch.empty(2 * count, dtype=torch.float64, device=base.device)
    target = storable(out)
    _unified_vector_kernel[(programs,)](
        loadable(base),
        tuple(map(loadable, experts)),
        tuple(masks),
        target,
        partial,
        n,
        count,
        ROWS,
        num_warps=4 if count <= MANY else 8,
        enable_fp_fusion=False,
    )
    _add_programs_kernel[(2 * count,)](partial, result, programs, MOST_PROGRAMS, num_warps=4)
    store(target, out)
    return result.cpu().numpy().reshape(count, 2)
