"""weighted_sum in Triton: elementwise, bound by memory; one 16-byte load a thread of each bfloat16 array."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024
MANY = 12  # arrays; beyond, a program takes half a block, or their loads would not fit in registers


@triton.jit
def _weighted_sum_kernel(arrays, weights, out, n: tl.int64, T: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    # all loads before the arithmetic, so that they are in flight together
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(arrays[t] + first + i, mask=inside),)
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        total += weights[t] * widen(loaded[t]).to(tl.float32)
    tl.store(out + first + i, narrow(total, out.dtype.element_ty), mask=inside)


def weighted_sum(arrays: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    n = out.numel()
    if n == 0:
        return
    block = BLOCK if len(arrays) <= MANY else BLOCK // 2
    target = storable(out)
    _weighted_sum_kernel[(triton.cdiv(n, block),)](
        tuple(map(loadable, arrays)) or (target,),  # an empty tuple is no kernel argument
        tuple(map(float, weights)) or (0.0,),
        target,
        n,
        len(arrays),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
