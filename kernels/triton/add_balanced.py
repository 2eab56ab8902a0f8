"""add_balanced in Triton: elementwise; base and experts are read once, for the sums and the scores."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.add_balanced import LEAST
from freemerge.kernels.balance_scores import inverse_of
from freemerge.kernels.triton._balance import arguments, block_for, clip, clipped_and_score, load_balanced
from freemerge.kernels.triton._convert import narrow, storable, store


@triton.jit
def _add_balanced_kernel(
    base,
    experts,
    lows,
    highs,
    inverses,
    floors,
    tops,
    scales,
    weights,
    least,
    out,
    n: tl.int64,
    NORMALIZED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    start, loaded, sums = load_balanced(base, experts, lows, highs, inverses, offsets, inside, NORMALIZED, T)
    total = tl.zeros([BLOCK], tl.float32)
    divisor = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(T):
        clipped, score = clipped_and_score(start, loaded[t], lows[t], highs[t], inverses[t], sums, T * 1.0)
        share = (clip(score, floors[t], tops[t]) - floors[t]) * scales[t]
        total += weights[t] * clipped * share
        divisor += share
    total = tl.div_rn(total, tl.where(divisor < least, least, divisor))
    tl.store(out + offsets, narrow(start + total, out.dtype.element_ty), mask=inside)


def add_balanced(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    lows: Sequence[float],
    highs: Sequence[float],
    floors: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    normalized: bool,
    out: torch.Tensor,
) -> None:
    n, block = out.numel(), block_for(experts)
    if n == 0:
        return
    first = arguments(base, experts, lows, highs)
    scales = [inverse_of(*pair) for pair in zip(floors, tops, strict=True)]
    target = storable(out, first[0])
    _add_balanced_kernel[(triton.cdiv(n, block),)](
        *first,
        *(tuple(map(float, numbers)) or (0.0,) for numbers in (floors, tops, scales, weights)),
        LEAST,
        target,
        n,
        bool(normalized),
        len(experts),
        block,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
