"""add_masked in Triton: elementwise, bound by memory; arrays and masks are read once, for the vote and the sum."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen
from freemerge.kernels.triton._masks import ROWS, entries, load_bytes, unpack


@triton.jit
def _add_masked_kernel(
    base,
    experts,
    masks,
    weights,
    votes,
    shares,
    least,
    scaling,
    out,
    n: tl.int64,
    ELECT: tl.constexpr,
    DIVIDE: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (ROWS * 8)
    lane = entries(ROWS)
    inside = first + lane < n
    # all loads before the arithmetic, so that they are in flight together
    start = tl.load(base + first + lane, mask=inside)
    loaded = ()
    kept = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(experts[t] + first + lane, mask=inside),)
        kept = kept + (load_bytes(masks[t], first, n, ROWS),)
    start = widen(start)

    if ELECT:
        sums = tl.zeros([ROWS, 8], tl.float32)
        for t in tl.static_range(T):
            sums += votes[t] * _entry(start, loaded[t], kept[t])
        positive = sums >= 0
    total = tl.zeros([ROWS, 8], tl.float32)
    divisor = tl.zeros([ROWS, 8], tl.float32)
    for t in tl.static_range(T):
        entry = _entry(start, loaded[t], kept[t])
        if ELECT:
            ballot = votes[t] * entry
            agrees = tl.where(positive, ballot > 0, ballot < 0)
            total += tl.where(agrees, weights[t] * entry, 0.0)
            divisor += tl.where(agrees, shares[t], 0.0)
        else:
            total += weights[t] * entry
            divisor += tl.where(unpack(kept[t]) != 0, shares[t], 0.0)
    if DIVIDE:
        divisor = tl.where(divisor == 0, 1.0, divisor)
        total = tl.div_rn(total, tl.where(least > 0, tl.maximum(divisor, least), divisor))
    tl.store(out + first + lane, narrow(start + scaling * total, out.dtype.element_ty), mask=inside)


@triton.jit
def _entry(start, expert, kept):
    """The entries of a task vector that a mask keeps, 0 elsewhere; worked out anew for the vote and for the sum."""
    return tl.where(unpack(kept) != 0, (widen(expert) - start).to(tl.float32), 0.0)


def add_masked(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    votes: Sequence[float] | None,
    shares: Sequence[float] | None,
    least: float,
    scaling: float,
    out: torch.Tensor,
) -> None:
    n = out.numel()
    if n == 0:
        return
    base, target = loadable(base), storable(out, base)
    zeros = [0.0] * len(experts)
    _add_masked_kernel[(triton.cdiv(n, ROWS * 8),)](
        base,
        tuple(map(loadable, experts)) or (base,),  # an empty tuple is no kernel argument
        tuple(masks) or (None,),
        *(tuple(map(float, numbers)) or (0.0,) for numbers in (weights, votes or zeros, shares or zeros)),
        float(least),
        float(scaling),
        target,
        n,
        votes is not None,
        shares is not None,
        len(experts),
        ROWS,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
