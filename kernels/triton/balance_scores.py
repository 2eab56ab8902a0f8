"""balance_scores in Triton: elementwise; base and experts are read once, the scores of all experts written."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._balance import arguments, block_for, clipped_and_score, load_balanced


@triton.jit
def _balance_scores_kernel(
    base,
    experts,
    lows,
    highs,
    inverses,
    out,
    n: tl.int64,
    NORMALIZED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    start, loaded, total = load_balanced(base, experts, lows, highs, inverses, offsets, inside, NORMALIZED, T)
    for t in tl.static_range(T):
        _, score = clipped_and_score(start, loaded[t], lows[t], highs[t], inverses[t], total, T * 1.0)
        tl.store(out + t * n + offsets, score, mask=inside)


def balance_scores(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    lows: Sequence[float],
    highs: Sequence[float],
    normalized: bool,
    out: torch.Tensor,
) -> None:
    n, block = base.numel(), block_for(experts)
    if n == 0 or not len(experts):
        return
    _balance_scores_kernel[(triton.cdiv(n, block),)](
        *arguments(base, experts, lows, highs),
        out,
        n,
        bool(normalized),
        len(experts),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
