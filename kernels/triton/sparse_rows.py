"""sparse_rows in Triton: thresholds, a sweep that counts, a sweep that writes; no sort, no index per element.

Over the whole tensor, segments of the flat array are counted, one program gives each its place and its share of the
ties, and the second sweep writes entries and the offsets of the rows that begin in a segment. By rows, every row has
its place from the start, and one sweep suffices. Nothing waits for the host but `within`, whose number of entries is
not known before.
"""

import torch
import triton
import triton.language as tl

from freemerge.kernels.array import column_dtype, rows_of, torch_dtype
from freemerge.kernels.sparse_rows import Selection
from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits
from freemerge.kernels.triton.magnitude_threshold import magnitude_threshold

SEGMENT = 16384
BLOCK = 1024
SEGMENTS_AT_ONCE = 1024


@triton.jit
def _count_segments_kernel(
    base, expert, lower, upper, counts, n: tl.int64, segments: tl.int64, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    """counts: int32 [4, segments], the entries greater than `lower` and equal to it, and the same for `upper`."""
    segment = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    upper_greater = tl.zeros([BLOCK], tl.int32)
    upper_equal = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(segment * SEGMENT, tl.minimum(n, (segment + 1) * SEGMENT), BLOCK, num_stages=3):
        inside = first + i < n
        bits = tl.where(inside, magnitude_bits(load_task_vector(base, expert, first + i, inside)), -1)
        cut = magnitude_bits(tl.load(lower))
        greater += (bits > cut).to(tl.int32)
        equal += (bits == cut).to(tl.int32)
        if upper is not None:
            cut = magnitude_bits(tl.load(upper))
            upper_greater += (bits > cut).to(tl.int32)
            upper_equal += (bits == cut).to(tl.int32)
    tl.store(counts + segment, tl.sum(greater, axis=0))
    tl.store(counts + segments + segment, tl.sum(equal, axis=0))
    if upper is not None:
        tl.store(counts + 2 * segments + segment, tl.sum(upper_greater, axis=0))
        tl.store(counts + 3 * segments + segment, tl.sum(upper_equal, axis=0))


@triton.jit
def _upto(counts, segments, segment, ties):
    """For segments in order: how many entries belong to a cut, and the ties left before each and after all."""
    inside = segment < segments
    greater = tl.load(counts + segment, mask=inside, other=0).to(tl.int64)
    equal = tl.load(counts + segments + segment, mask=inside, other=0).to(tl.int64)
    left = tl.maximum(ties - (tl.cumsum(equal, axis=0) - equal), 0)
    return greater + tl.minimum(equal, left), left, tl.maximum(ties - tl.sum(equal, axis=0), 0)


@triton.jit
def _place_segments_kernel(counts, lower_ties, upper_ties, places, total, segments: tl.int64, BLOCK: tl.constexpr):
    """places: int64 [3, segments], where the entries of a segment begin, and the ties left to it in both cuts."""
    position = tl.full((), 0, tl.int64)
    ties = tl.load(lower_ties)
    left_out = tl.full((), 0, tl.int64)
    if upper_ties is not None:
        left_out = tl.load(upper_ties)
    for first in range(0, segments, BLOCK):
        segment = first + tl.arange(0, BLOCK)
        inside = segment < segments
        kept, left, ties = _upto(counts, segments, segment, ties)
        tl.store(places + segments + segment, left, mask=inside)
        if upper_ties is not None:
            without, left, left_out = _upto(counts + 2 * segments, segments, segment, left_out)
            tl.store(places + 2 * segments + segment, left, mask=inside)
            kept = tl.maximum(kept - without, 0)
        tl.store(places + segment, position + tl.cumsum(kept, axis=0) - kept, mask=inside)
        position += tl.sum(kept, axis=0)
    tl.store(total, position)


@triton.jit
def _belongs(bits, cut, ties, BLOCK: tl.constexpr):
    """Which entries lie above the cut, or on it and among its first `ties`; and how many ties are left."""
    equal = (bits == cut).to(tl.int32)
    first = tl.cumsum(equal, axis=0) <= tl.maximum(tl.minimum(ties, BLOCK), 0).to(tl.int32)
    return (bits > cut) | ((equal != 0) & first), ties - tl.sum(equal, axis=0)


@triton.jit
def _write_segments_kernel(
    base,
    expert,
    lower,
    upper,
    places,
    offsets,
    columns,
    values,
    n: tl.int64,
    width: tl.int64,
    segments: tl.int64,
    LONG_ROWS: tl.constexpr,  # at least BLOCK
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    position = tl.load(places + segment)
    ties = tl.load(places + segments + segment)
    left_out_ties = ties
    if upper is not None:
        left_out_ties = tl.load(places + 2 * segments + segment)
    for first in tl.range(segment * SEGMENT, tl.minimum(n, (segment + 1) * SEGMENT), BLOCK, num_stages=3):
        inside = first + i < n
        x = load_task_vector(base, expert, first + i, inside)
        bits = tl.where(inside, magnitude_bits(x), -1)
        chosen, ties = _belongs(bits, magnitude_bits(tl.load(lower)), ties, BLOCK)
        if upper is not None:
            left_out, left_out_ties = _belongs(bits, magnitude_bits(tl.load(upper)), left_out_ties, BLOCK)
            chosen = chosen & ~left_out
        count = chosen.to(tl.int32)
        place = tl.cumsum(count, axis=0) - count

        row = first // width
        start = first - row * width  # the column of the first element
        if LONG_ROWS:
            wraps = i >= tl.minimum(width - start, BLOCK).to(tl.int32)
            below = wraps.to(tl.int32)
            column = (start + i - tl.where(wraps, width, 0)).to(tl.uint32)
        else:
            below = (start.to(tl.int32) + i) // tl.cast(width, tl.int32)
            column = (start.to(tl.int32) + i - below * tl.cast(width, tl.int32)).to(tl.uint32)
        tl.store(offsets + row + below, position + place, mask=inside & (column == 0))
        tl.store(columns + position + place, column.to(columns.dtype.element_ty), mask=chosen)
        tl.store(values + position + place, x, mask=chosen)
        position += tl.sum(count, axis=0)


@triton.jit
def _write_rows_kernel(
    base,
    expert,
    lower,
    lower_ties,
    upper,
    upper_ties,
    columns,
    values,
    width: tl.int64,
    kept: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    position = row * kept
    ties = tl.load(lower_ties + row)
    left_out_ties = ties
    if upper is not None:
        left_out_ties = tl.load(upper_ties + row)
    for first in tl.range(0, width, BLOCK, num_stages=3):
        inside = first + i < width
        x = load_task_vector(base, expert, row * width + first + i, inside)
        bits = tl.where(inside, magnitude_bits(x), -1)
        chosen, ties = _belongs(bits, magnitude_bits(tl.load(lower + row)), ties, BLOCK)
        if upper is not None:
            left_out, left_out_ties = _belongs(bits, magnitude_bits(tl.load(upper + row)), left_out_ties, BLOCK)
            chosen = chosen & ~left_out
        count = chosen.to(tl.int32)
        place = tl.cumsum(count, axis=0) - count
        tl.store(columns + position + place, (first + i).to(columns.dtype.element_ty), mask=chosen)
        tl.store(values + position + place, x, mask=chosen)
        position += tl.sum(count, axis=0)


Cut = tuple[torch.Tensor, torch.Tensor]  # values and ties, as magnitude_threshold gives them
Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # offsets, columns, values


def sparse_rows(
    base: torch.Tensor | None,
    expert: torch.Tensor,
    first: int,
    last: int | None,
    scope: str,
    within: Selection | None,
) -> Entries:
    base, expert = loadable(base), loadable(expert)
    if within is None:
        cut_scope = "row" if scope == "row" else "model"
        lower = magnitude_threshold([base], [expert], last, cut_scope)
        upper = magnitude_threshold([base], [expert], first, cut_scope) if first else None
        if scope == "row":
            return _each_row(base, expert, lower, upper, last - first)
        return _whole(base, expert, lower, upper, last - first)
    lower = _cut(within.lower, within.lower_ties, expert)
    upper = _cut(within.upper, within.upper_ties, expert)
    return _whole(base, expert, lower, upper, None)


def _cut(value: float, ties: int, like: torch.Tensor) -> Cut:
    # filled on the device: nothing is copied, nothing waits
    value = torch.full((1,), value, dtype=torch.float32, device=like.device)
    return value, torch.full((1,), ties, dtype=torch.int64, device=like.device)


def _empty(count: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns = torch.empty(count, dtype=torch_dtype(column_dtype(width)), device=like.device)
    return columns, torch.empty(count, dtype=torch.float32, device=like.device)


def _whole(
    base: torch.Tensor | None, expert: torch.Tensor, lower: Cut, upper: Cut | None, count: int | None
) -> Entries:
    """The entries between two cuts; `count` of them, or None where that has to be found out."""
    (rows, width), n = rows_of(expert.shape), expert.numel()
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=expert.device)
    if n == 0:
        return offsets, *_empty(0, width, expert)
    (lower, lower_ties), (upper, upper_ties) = lower, upper or (None, None)
    segments = triton.cdiv(n, SEGMENT)
    counts = torch.empty(4 * segments, dtype=torch.int32, device=expert.device)
    places = torch.empty(3 * segments, dtype=torch.int64, device=expert.device)
    _count_segments_kernel[(segments,)](base, expert, lower, upper, counts, n, segments, SEGMENT, BLOCK, num_warps=4)
    _place_segments_kernel[(1,)](
        counts, lower_ties, upper_ties, places, offsets[-1:], segments, SEGMENTS_AT_ONCE, num_warps=4
    )
    columns, values = _empty(int(offsets[-1]) if count is None else count, width, expert)
    _write_segments_kernel[(segments,)](
        base,
        expert,
        lower,
        upper,
        places,
        offsets,
        columns,
        values,
        n,
        width,
        segments,
        width >= BLOCK,
        SEGMENT,
        BLOCK,
        num_warps=4,
    )
    return offsets, columns, values


def _each_row(base: torch.Tensor | None, expert: torch.Tensor, lower: Cut, upper: Cut | None, kept: int) -> Entries:
    """The `kept` entries of each row between its two cuts."""
    rows, width = rows_of(expert.shape)
    offsets = torch.arange(rows + 1, device=expert.device) * kept
    columns, values = _empty(rows * kept, width, expert)
    if rows * kept:
        block = min(BLOCK, max(32, triton.next_power_of_2(width)))
        _write_rows_kernel[(rows,)](
            base,
            expert,
            *lower,
            *(upper or (None, None)),
            columns,
            values,
            width,
            kept,
            block,
            num_warps=max(1, block // 256),
        )
    return offsets, columns, values
