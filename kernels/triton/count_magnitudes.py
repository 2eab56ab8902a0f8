"""count_magnitudes in Triton: one sweep that counts in registers, and two integer additions a program."""

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits

BLOCK = 1024
MOST_PROGRAMS = 2048


@triton.jit(do_not_specialize=["cut"])
def _count_magnitudes_kernel(base, expert, cut, counts, n: tl.int64, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride, num_stages=3):
        inside = first + i < n
        bits = magnitude_bits(load_task_vector(base, expert, first + i, inside))
        greater += (inside & (bits > cut)).to(tl.int32)
        equal += (inside & (bits == cut)).to(tl.int32)
    tl.atomic_add(counts, tl.sum(greater.to(tl.int64), axis=0))
    tl.atomic_add(counts + 1, tl.sum(equal.to(tl.int64), axis=0))


def count_magnitudes(base: torch.Tensor | None, expert: torch.Tensor, value: float) -> tuple[int, int]:
    n = expert.numel()
    counts = torch.zeros(2, dtype=torch.int64, device=expert.device)
    if n:
        cut = int(np.abs(np.float32(value)).view(np.int32))
        _count_magnitudes_kernel[(min(triton.cdiv(n, BLOCK), MOST_PROGRAMS),)](
            loadable(base), loadable(expert), cut, counts, n, BLOCK, num_warps=4
        )
    return tuple(counts.tolist())
