"""add_task_vectors in Triton: elementwise, bound by memory; one 16-byte load a thread of each bfloat16 array."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024
MANY = 12  # arrays; beyond, a program takes half a block, or their loads would not fit in registers


@triton.jit
def _add_task_vectors_kernel(base, experts, weights, out, n: tl.int64, T: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    # all loads before the arithmetic, so that they are in flight together
    start = tl.load(base + first + i, mask=inside)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(experts[t] + first + i, mask=inside),)
    start = widen(start)
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        total += weights[t] * (widen(loaded[t]) - start).to(tl.float32)
    tl.store(out + first + i, narrow(start + total, out.dtype.element_ty), mask=inside)


def add_task_vectors(
    base: torch.Tensor, experts: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor
) -> None:
    n = out.numel()
    if n == 0:
        return
    block = BLOCK if len(experts) <= MANY else BLOCK // 2
    base, target = loadable(base), storable(out, base)
    _add_task_vectors_kernel[(triton.cdiv(n, block),)](
        base,
        tuple(map(loadable, experts)) or (base,),  # an empty tuple is no kernel argument
        tuple(map(float, weights)) or (0.0,),
        target,
        n,
        len(experts),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
