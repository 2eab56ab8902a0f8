"""add_elected in Triton: elementwise, bound by memory; the task vectors are read once, for the vote and the sum."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024
MANY = 12  # arrays; beyond, a program takes half a block, or their loads would not fit in registers


@triton.jit
def _add_elected_kernel(
    base,
    task_vectors,
    weights,
    scaling,
    out,
    n: tl.int64,
    NORMALIZE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    start = tl.load(base + first + i, mask=inside)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(task_vectors[t] + first + i, mask=inside),)

    votes = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        votes += weights[t] * widen(loaded[t]).to(tl.float32)
    positive = votes >= 0

    total = tl.zeros([BLOCK], tl.float32)
    agreeing = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        value = weights[t] * widen(loaded[t]).to(tl.float32)
        agrees = tl.where(positive, value > 0, value < 0)
        total += tl.where(agrees, value, 0.0)
        agreeing += tl.where(agrees, weights[t], 0.0)
    if NORMALIZE:
        total = tl.div_rn(total, tl.where(agreeing == 0, 1.0, agreeing))
    tl.store(out + first + i, narrow(widen(start) + scaling * total, out.dtype.element_ty), mask=inside)


def add_elected(
    base: torch.Tensor,
    task_vectors: Sequence[torch.Tensor],
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    out: torch.Tensor,
) -> None:
    n = out.numel()
    if n == 0:
        return
    block = BLOCK if len(task_vectors) <= MANY else BLOCK // 2
    base, target = loadable(base), storable(out, base)
    _add_elected_kernel[(triton.cdiv(n, block),)](
        base,
        tuple(map(loadable, task_vectors)) or (base,),  # an empty tuple is no kernel argument
        tuple(map(float, weights)) or (0.0,),
        float(scaling),
        target,
        n,
        bool(normalize),
        len(task_vectors),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
