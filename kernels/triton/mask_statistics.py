"""mask_statistics in Triton: one sweep, partial sums in float64 registers, one number of programs for all GPUs.

Program p takes the tiles p, p + P, ...; P depends on the number of entries only, and a second kernel adds the programs'
sums in order: the result does not depend on the device.
"""

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import load_task_vector, loadable
from freemerge.kernels.triton._masks import ROWS, entries, load_bytes, unpack

MOST_PROGRAMS = 2048


@triton.jit
def _mask_statistics_kernel(base, expert, mask, partial, n: tl.int64, ROWS: tl.constexpr):
    lane = entries(ROWS)
    count = tl.zeros([ROWS], tl.int64)
    sum_abs = tl.zeros([ROWS], tl.float64)
    kept_abs = tl.zeros([ROWS], tl.float64)
    kept_squares = tl.zeros([ROWS], tl.float64)
    stride = tl.num_programs(0).to(tl.int64) * (ROWS * 8)
    for first in range(tl.program_id(0).to(tl.int64) * (ROWS * 8), n, stride):
        kept = unpack(load_bytes(mask, first, n, ROWS))
        magnitude = tl.abs(load_task_vector(base, expert, first + lane, first + lane < n).to(tl.float64))
        mine = tl.where(kept != 0, magnitude, 0.0)
        count += tl.sum(kept, axis=1)
        sum_abs += tl.sum(magnitude, axis=1)
        kept_abs += tl.sum(mine, axis=1)
        kept_squares += tl.sum(mine * mine, axis=1)
    place = partial + tl.program_id(0)
    tl.store(place, tl.sum(count, axis=0).to(tl.float64))
    tl.store(place + tl.num_programs(0), tl.sum(sum_abs, axis=0))
    tl.store(place + 2 * tl.num_programs(0), tl.sum(kept_abs, axis=0))
    tl.store(place + 3 * tl.num_programs(0), tl.sum(kept_squares, axis=0))


@triton.jit
def _add_programs_kernel(partial, result, programs, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mine = tl.load(partial + tl.program_id(0) * programs + i, mask=i < programs, other=0.0)
    tl.store(result + tl.program_id(0), tl.sum(mine, axis=0))


def mask_statistics(
    base: torch.Tensor | None, expert: torch.Tensor, mask: torch.Tensor
) -> tuple[float, float, float, float]:
    n = expert.numel()
    if n == 0:
        return 0.0, 0.0, 0.0, 0.0
    programs = min(triton.cdiv(n, ROWS * 8), MOST_PROGRAMS)
    partial = torch.empty(4 * programs, dtype=torch.float64, device=expert.device)
    result = torch.empty(4, dtype=torch.float64, device=expert.device)
    # squares of float32 numbers are exact in float64, so that fused multiply-adds round as the CPU does
    _mask_statistics_kernel[(programs,)](
        loadable(base), loadable(expert), mask, partial, n, ROWS, num_warps=4, enable_fp_fusion=True
    )
    _add_programs_kernel[(4,)](partial, result, programs, MOST_PROGRAMS, num_warps=4)
    return tuple(result.tolist())
