"""task_vector_variance in Triton: elementwise, bound by memory; the experts are read once, for mean and variance."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, widen

BLOCK = 1024


@triton.jit
def _task_vector_variance_kernel(base, experts, out, n: tl.int64, T: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < n
    # all loads before the arithmetic, so that they are in flight together
    start = tl.load(base + first + i, mask=inside)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(experts[t] + first + i, mask=inside),)
    start = widen(start)
    count = tl.full([BLOCK], T, tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        mean += (widen(loaded[t]) - start).to(tl.float32)
    mean = tl.div_rn(mean, count)
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        distance = (widen(loaded[t]) - start).to(tl.float32) - mean
        total += distance * distance
    tl.store(out + first + i, tl.div_rn(total, count), mask=inside)


def task_vector_variance(base: torch.Tensor, experts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    n = out.numel()
    if n == 0:
        return
    _task_vector_variance_kernel[(triton.cdiv(n, BLOCK),)](
        loadable(base),
        tuple(map(loadable, experts)),
        out,
        n,
        len(experts),
        BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
