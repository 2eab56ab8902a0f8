"""near_swap in Triton: elementwise, bound by memory; one 16-byte load a thread of each bfloat16 array."""

import torch
import triton
import triton.language as tl

from freemerge.kernels.near_swap import SMALLEST
from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen

BLOCK = 1024


@triton.jit
def _near_swap_kernel(base, expert, t, smallest, out, n: tl.int64, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    start = tl.load(base + first + i, mask=inside)
    end = tl.load(expert + first + i, mask=inside)
    start = widen(start).to(tl.float32)
    end = widen(end).to(tl.float32)
    difference = tl.abs(start - end)
    difference = tl.where(difference < smallest, smallest, difference)
    share = tl.div_rn(tl.zeros([BLOCK], tl.float32) + t, difference)
    share = tl.where(share < 0, 0.0, share)
    share = tl.where(share > 1, 1.0, share)
    tl.store(out + first + i, narrow(share * end + (1 - share) * start, out.dtype.element_ty), mask=inside)


def near_swap(base: torch.Tensor, expert: torch.Tensor, t: float, out: torch.Tensor) -> None:
    n = out.numel()
    if n == 0:
        return
    target = storable(out)
    _near_swap_kernel[(triton.cdiv(n, BLOCK),)](
        loadable(base),
        loadable(expert),
        float(t),
        SMALLEST,
        target,
        n,
        BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
