"""sign_majority in Triton: one sweep that counts in registers, and one integer addition a program."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable
from freemerge.kernels.triton.add_trimmed import BLOCK, MANY, load_trimmed, trimmed

MOST_PROGRAMS = 2048


@triton.jit
def _sign_majority_kernel(base, experts, floors, balance, n: tl.int64, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mine = tl.zeros([BLOCK], tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride, num_stages=3):
        start, loaded = load_trimmed(base, experts, first + i, first + i < n, T)
        total = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(T):
            total += trimmed(start, loaded[t], floors[t])
        mine += (total > 0).to(tl.int64) - (total < 0).to(tl.int64)
    tl.atomic_add(balance, tl.sum(mine, axis=0))


def sign_majority(base: torch.Tensor, experts: Sequence[torch.Tensor], floors: Sequence[float]) -> int:
    n = base.numel()
    balance = torch.zeros(1, dtype=torch.int64, device=base.device)
    if n and len(experts):
        block = BLOCK if len(experts) <= MANY else BLOCK // 2
        _sign_majority_kernel[(min(triton.cdiv(n, block), MOST_PROGRAMS),)](
            loadable(base),
            tuple(map(loadable, experts)),
            tuple(map(float, floors)),
            balance,
            n,
            len(experts),
            block,
            num_warps=4,
        )
    return int(balance)
