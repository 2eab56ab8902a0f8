"""magnitude_mask in Triton: the arrays are read once; which of the ties belong is decided on bits.

Over the whole tensor a first sweep writes the mask of what lies between the thresholds for certain, masks of the
entries equal to them, and how many of these each segment has; a second sweep reads no more than these masks. By rows,
every row has a program of its own, which counts its ties as it goes. Nothing waits for the host.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels._masks import mask_bytes
from freemerge.kernels.array import rows_of
from freemerge.kernels.magnitude_threshold import Threshold
from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits
from freemerge.kernels.triton._masks import ROWS, entries, load_bytes, pack, store_bits, unpack

SEGMENT = 16384  # entries, a multiple of a tile's


@triton.jit
def _split_kernel(
    base,
    expert,
    lower,
    upper,
    mask,
    equal_lower,
    equal_upper,
    counts,
    n: tl.int64,
    INCLUSIVE: tl.constexpr,  # all that is equal to `lower` is kept
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`counts`: int32 [2, segments], the entries equal to `lower` and to `upper`."""
    segment = tl.program_id(0).to(tl.int64)
    segments = tl.num_programs(0)
    lane = entries(ROWS)
    least = magnitude_bits(tl.load(lower))
    most = magnitude_bits(tl.load(upper if upper is not None else lower))
    lower_count = tl.zeros([ROWS], tl.int32)
    upper_count = tl.zeros([ROWS], tl.int32)
    for first in range(segment * SEGMENT, tl.minimum(n, (segment + 1) * SEGMENT), ROWS * 8):
        inside = first + lane < n
        bits = tl.where(inside, magnitude_bits(load_task_vector(base, expert, first + lane, inside)), -1)
        kept = bits > least
        if INCLUSIVE:
            kept = bits >= least
        if upper is not None:
            kept = kept & (bits < most)
            equal = (bits == most).to(tl.int32)
            upper_count += tl.sum(equal, axis=1)
            store_bits(equal_upper, first, n, equal, ROWS)
        store_bits(mask, first, n, kept.to(tl.int32), ROWS)
        if equal_lower is not None:
            equal = (bits == least).to(tl.int32)
            lower_count += tl.sum(equal, axis=1)
            store_bits(equal_lower, first, n, equal, ROWS)
    if equal_lower is not None:
        tl.store(counts + segment, tl.sum(lower_count, axis=0))
    if upper is not None:
        tl.store(counts + segments + segment, tl.sum(upper_count, axis=0))


@triton.jit
def _first_ties(equal, ties, ROWS: tl.constexpr):
    """Which of a tile's entries equal to a threshold are among the first `ties`; and how many ties are left."""
    of_row = tl.sum(equal, axis=1)
    before = (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(equal, axis=1)
    first = equal & (before <= tl.minimum(ties, ROWS * 8).to(tl.int32)).to(tl.int32)
    return first, tl.maximum(ties - tl.sum(of_row, axis=0), 0)


@triton.jit
def _allot_ties_kernel(
    lower, upper, mask, equal_lower, equal_upper, ties, n: tl.int64, SEGMENT: tl.constexpr, ROWS: tl.constexpr
):
    """Complete `mask` by the entries equal to a threshold; `ties`: int64 [2, segments], those left to a segment."""
    segment = tl.program_id(0).to(tl.int64)
    least = magnitude_bits(tl.load(lower))
    most = magnitude_bits(tl.load(upper if upper is not None else lower))
    lower_ties = tl.load(ties + segment)
    upper_ties = lower_ties
    if upper is not None:
        upper_ties = tl.load(ties + tl.num_programs(0) + segment)
    for first in range(segment * SEGMENT, tl.minimum(n, (segment + 1) * SEGMENT), ROWS * 8):
        kept, lower_ties = _first_ties(unpack(load_bytes(equal_lower, first, n, ROWS)), lower_ties, ROWS)
        if upper is not None:
            equal = unpack(load_bytes(equal_upper, first, n, ROWS))
            above, upper_ties = _first_ties(equal, upper_ties, ROWS)
            kept = tl.where(least < most, kept | (equal & ~above), tl.where(least == most, kept & ~above, 0))
        store_bits(mask, first, n, unpack(load_bytes(mask, first, n, ROWS)) | kept, ROWS)


@triton.jit
def _belongs(bits, threshold, ties, ROWS: tl.constexpr):
    cut = magnitude_bits(threshold)
    first, ties = _first_ties((bits == cut).to(tl.int32), ties, ROWS)
    return (bits > cut).to(tl.int32) | first, ties


@triton.jit
def _mask_rows_kernel(
    base,
    expert,
    lower,
    lower_ties,
    upper,
    upper_ties,
    mask,
    width: tl.int64,
    PACKED: tl.constexpr,  # a byte of the mask lies in one row; else `mask` has a byte an entry
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = entries(ROWS)
    threshold = tl.load(lower + row)
    ties = tl.load(lower_ties + row)
    above_threshold = threshold
    above_ties = ties
    if upper is not None:
        above_threshold = tl.load(upper + row)
        above_ties = tl.load(upper_ties + row)
    for first in range(0, width, ROWS * 8):
        inside = first + lane < width
        bits = tl.where(inside, magnitude_bits(load_task_vector(base, expert, row * width + first + lane, inside)), -1)
        kept, ties = _belongs(bits, threshold, ties, ROWS)
        if upper is not None:
            above, above_ties = _belongs(bits, above_threshold, above_ties, ROWS)
            kept = kept & ~above
        if PACKED:
            store_bits(mask + row * (width // 8), first, width, kept, ROWS)
        else:
            tl.store(mask + row * width + first + lane, kept.to(tl.uint8), mask=inside)


def magnitude_mask(
    base: torch.Tensor | None, expert: torch.Tensor, lower: Threshold, upper: Threshold | None, out: torch.Tensor
) -> None:
    if expert.numel() == 0:
        return
    base, expert = loadable(base), loadable(expert)
    settled = _settled(lower, expert.numel()) if upper is None else None
    lower = _there(lower, expert)
    upper = _there(upper, expert) if upper is not None else (None, None)
    if len(lower[0]) > 1:
        _each_row(base, expert, lower, upper, out)
    else:
        _whole(base, expert, lower, upper, settled, out)


def _settled(threshold: Threshold, n: int) -> str | None:
    """Whether "all" or "none" of the entries equal to a threshold belong to it, if the host knows that."""
    if len(threshold.ties) != 1 or not isinstance(threshold.ties, np.ndarray):
        return None
    return "none" if threshold.ties[0] <= 0 else "all" if threshold.ties[0] >= n else None


def _there(threshold: Threshold, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its values and ties on the device; a single number of the host's is filled there: nothing is copied or waits."""
    values, ties = threshold
    if not isinstance(values, np.ndarray):
        return values, ties
    parts = (values.astype(np.float32), torch.float32), (ties.astype(np.int64), torch.int64)
    if len(values) == 1:
        return tuple(torch.full((1,), part.item(), dtype=dtype, device=like.device) for part, dtype in parts)
    return tuple(torch.tensor(part, device=like.device) for part, _ in parts)


def _whole(base, expert, lower, upper, settled: str | None, mask: torch.Tensor) -> None:
    n = expert.numel()
    segments = triton.cdiv(n, SEGMENT)
    (lower, lower_ties), (upper, upper_ties) = lower, upper
    equal_lower = torch.empty_like(mask) if settled is None else None
    equal_upper = torch.empty_like(mask) if upper is not None else None
    counts = torch.empty((2, segments), dtype=torch.int32, device=mask.device) if settled is None else None
    _split_kernel[(segments,)](
        base,
        expert,
        lower,
        upper,
        mask,
        equal_lower,
        equal_upper,
        counts,
        n,
        settled == "all",
        SEGMENT,
        ROWS,
        num_warps=4,
    )
    if settled is None:
        counts = counts if upper is not None else counts[:1]
        ties = torch.stack([lower_ties, upper_ties]) if upper is not None else lower_ties[None]
        left = (ties - (counts.cumsum(1) - counts)).clamp(min=0)
        _allot_ties_kernel[(segments,)](
            lower, upper, mask, equal_lower, equal_upper, left, n, SEGMENT, ROWS, num_warps=4
        )


def _each_row(base, expert, lower, upper, mask: torch.Tensor) -> None:
    rows, width = rows_of(expert.shape)
    packed = width % 8 == 0
    target = mask if packed else torch.empty(rows * width, dtype=torch.uint8, device=mask.device)
    block = min(ROWS, max(16, triton.next_power_of_2(mask_bytes(width))))
    _mask_rows_kernel[(rows,)](
        base, expert, *lower, *upper, target, width, packed, block, num_warps=max(1, block // 32)
    )
    if not packed:
        pack(target, mask)
