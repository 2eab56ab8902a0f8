"""add_trimmed in Triton: elementwise, bound by memory; the arrays are read once, for the vote and the sum."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024
MANY = 12  # experts; beyond, a program takes half a block, or their loads would not fit in registers


@triton.jit
def load_trimmed(base, experts, offsets, inside, T: tl.constexpr):
    """An element of base in its dtype of arithmetic, and of each expert as it is stored; all loads are in flight."""
    start = tl.load(base + offsets, mask=inside, other=0.0)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(experts[t] + offsets, mask=inside, other=0.0),)
    return widen(start), loaded


@triton.jit
def trimmed(start, expert, floor):
    """The entries of a task vector, float32, 0 below the floor; worked out anew for the vote and for the sum."""
    entry = (widen(expert) - start).to(tl.float32)
    return tl.where(tl.abs(entry) < floor, 0.0, entry)


@triton.jit
def _add_trimmed_kernel(
    base,
    experts,
    floors,
    zeros,
    scaling,
    out,
    n: tl.int64,
    MEAN: tl.constexpr,
    LARGEST: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    start, loaded = load_trimmed(base, experts, offsets, inside, T)

    votes = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        votes += trimmed(start, loaded[t], floors[t])
    signs = tl.where(votes == 0, zeros, tl.where(votes > 0, 1.0, -1.0))

    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        entry = trimmed(start, loaded[t], floors[t])
        agrees = tl.where(signs > 0, entry > 0, entry < 0)
        if LARGEST:
            total = tl.maximum(total, tl.where(agrees, tl.abs(entry), 0.0))
        else:
            total += tl.where(agrees, entry, 0.0)
        count += tl.where(agrees, 1.0, 0.0)
    if LARGEST:
        total = total * signs
    if MEAN:
        total = tl.div_rn(total, tl.maximum(count, 1.0))
    tl.store(out + offsets, narrow(start + scaling * total, out.dtype.element_ty), mask=inside)


def add_trimmed(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    floors: Sequence[float],
    zeros: int,
    combination: str,
    scaling: float,
    out: torch.Tensor,
) -> None:
    n = out.numel()
    if n == 0:
        return
    block = BLOCK if len(experts) <= MANY else BLOCK // 2
    base, target = loadable(base), storable(out, base)
    _add_trimmed_kernel[(triton.cdiv(n, block),)](
        base,
        tuple(map(loadable, experts)) or (base,),  # an empty tuple is no kernel argument
        tuple(map(float, floors)) or (0.0,),
        float(zeros),
        float(scaling),
        target,
        n,
        combination == "mean",
        combination == "max",
        len(experts),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
