"""magnitude_threshold in Triton: the bits of the magnitudes, digit by digit from the top, by histograms.

Over whole arrays: five sweeps, each counting the next digit (7 bits, then 6) of the elements that share the digits
found so far, in registers and with one integer addition a bin and program. The next sweep begins by choosing the digit,
so that nothing waits for the host. More bins would need fewer sweeps, but Triton's histogram takes votes and
counts for every bin, some 30 instructions an element with 64 bins, 45 with 128, 400 with 2048.

By rows: a row that fits in registers is read once and bisected there; a longer one is swept digit by digit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.array import rows_of
from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits

DIGITS = ((24, 128), (18, 64), (12, 64), (6, 64), (0, 64))  # shift, bins
BLOCK = 2048
MOST_PROGRAMS = 2048
MOST_COLUMNS = 16384  # of a row held in registers
TILE = 4096  # elements of short rows that share a program


@triton.jit
def _count_digit(
    base,
    expert,
    first,
    end,
    stride,
    prefix,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """int32 [BINS]: how often each digit occurs, in tiles first, first + stride, ..., after this prefix."""
    i = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for start in tl.range(first, end, stride, num_stages=STAGES):
        inside = start + i < end
        digit = (magnitude_bits(load_task_vector(base, expert, start + i, inside)) >> SHIFT) - prefix * BINS
        counts += tl.histogram(digit, BINS, mask=inside & (digit >= 0) & (digit < BINS))
    return counts


@triton.jit
def _choose_digit(counts, prefix, greater, rank, BINS: tl.constexpr):
    """The prefix longer by the digit of the element of this rank, and how many elements are beyond it."""
    digits = tl.arange(0, BINS)
    digit = tl.sum((tl.cumsum(counts, axis=0, reverse=True) + greater >= rank).to(tl.int32), axis=0) - 1
    return prefix * BINS + digit, greater + tl.sum(tl.where(digits > digit, counts, 0), axis=0)


@triton.jit(do_not_specialize=["rank"])
def _count_digit_kernel(
    base,
    expert,
    rank: tl.int64,
    found,  # int64 [4]: prefix and number of greater elements before the last digit counted, and with it
    counted,  # int64 [COUNTED]: how often each last digit occurs; COUNTED = 0: none was counted yet
    counts,  # int64 [BINS]: the same for the next digit, added to
    n: tl.int64,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    prefix = tl.full((), 0, tl.int32)
    if COUNTED > 0:  # every program chooses for itself: cheaper than one more launch
        before = tl.load(counted + tl.arange(0, COUNTED))
        chosen, greater = _choose_digit(before, tl.load(found), tl.load(found + 1), rank, COUNTED)
        if tl.program_id(0) == 0:
            tl.store(found + 2, chosen)
            tl.store(found + 3, greater)
        prefix = chosen.to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    mine = _count_digit(base, expert, first, n, stride, prefix, SHIFT, BINS, BLOCK, 3)
    tl.atomic_add(counts + tl.arange(0, BINS), mine.to(tl.int64))


@triton.jit(do_not_specialize=["rank"])
def _choose_last_digit_kernel(rank: tl.int64, found, counted, value, ties, COUNTED: tl.constexpr):
    before = tl.load(counted + tl.arange(0, COUNTED))
    prefix, greater = _choose_digit(before, tl.load(found), tl.load(found + 1), rank, COUNTED)
    tl.store(value, prefix.to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(ties, rank - greater)


@triton.jit(do_not_specialize=["rank"])
def _bisect_rows_kernel(
    base,
    expert,
    rank,
    values,
    ties,
    rows: tl.int64,
    width: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (first + row < rows)[:, None] & (column < width)[None, :]
    offsets = first * width + row[:, None] * tl.cast(width, tl.int32) + column[None, :]
    bits = tl.where(inside, magnitude_bits(load_task_vector(base, expert, offsets, inside)), -1)
    value = tl.zeros([ROWS], tl.int32)
    for k in range(31):
        larger = value | (1 << (30 - k))
        reached = tl.sum((bits >= larger[:, None]).to(tl.int32), axis=1)
        value = tl.where(reached >= rank, larger, value)
    greater = tl.sum((bits > value[:, None]).to(tl.int32), axis=1)
    tl.store(values + first + row, value.to(tl.float32, bitcast=True), mask=first + row < rows)
    tl.store(ties + first + row, (rank - greater).to(tl.int64), mask=first + row < rows)


@triton.jit(do_not_specialize=["rank"])
def _sweep_row_kernel(base, expert, rank: tl.int64, values, ties, width: tl.int64, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = row * width
    prefix = tl.full((), 0, tl.int32)
    greater = tl.full((), 0, tl.int32)
    for k in tl.static_range(5):  # DIGITS
        counts = _count_digit(
            base, expert, first, first + width, BLOCK, prefix, 24 - 6 * k, 128 if k == 0 else 64, BLOCK, 1
        )
        prefix, greater = _choose_digit(counts, prefix, greater, rank, 128 if k == 0 else 64)
    tl.store(values + row, prefix.to(tl.float32, bitcast=True))
    tl.store(ties + row, rank - greater)


def magnitude_threshold(
    bases: Sequence[torch.Tensor | None], experts: Sequence[torch.Tensor], rank: int, scope: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows_of(experts[0].shape)[0] if scope == "row" else 1
    values = torch.full((rows,), torch.inf, dtype=torch.float32, device=experts[0].device)
    ties = torch.zeros(rows, dtype=torch.int64, device=experts[0].device)
    if rank and rows:
        pairs = [(loadable(base), loadable(expert)) for base, expert in zip(bases, experts, strict=True)]
        if scope == "row":
            _rows(*pairs[0], rank, values, ties)
        else:
            _together(pairs, rank, values, ties)
    return values, ties


def _together(pairs, rank: int, value: torch.Tensor, ties: torch.Tensor) -> None:
    spaces = [bins for _, bins in DIGITS]
    zeros = torch.zeros(2 * len(DIGITS) + sum(spaces), dtype=torch.int64, device=value.device)
    found, *counts = zeros.split([2 * len(DIGITS), *spaces])
    counted, known = counts[0], 0  # nothing yet
    for k, (shift, bins) in enumerate(DIGITS):
        for base, expert in pairs:
            if n := expert.numel():
                programs = min(triton.cdiv(n, BLOCK), MOST_PROGRAMS)
                _count_digit_kernel[(programs,)](
                    base, expert, rank, found, counted, counts[k], n, shift, bins, known, BLOCK, num_warps=4
                )
        found, counted, known = found[2 * (k > 0) :], counts[k], bins
    _choose_last_digit_kernel[(1,)](rank, found, counted, value, ties, known, num_warps=1)


def _rows(base: torch.Tensor | None, expert: torch.Tensor, rank: int, values: torch.Tensor, ties: torch.Tensor) -> None:
    rows, width = rows_of(expert.shape)
    if width > MOST_COLUMNS:
        _sweep_row_kernel[(rows,)](base, expert, rank, values, ties, width, BLOCK, num_warps=4)
        return
    columns = triton.next_power_of_2(width)
    together = max(1, TILE // columns)
    _bisect_rows_kernel[(triton.cdiv(rows, together),)](
        base, expert, rank, values, ties, rows, width, together, columns, num_warps=max(4, columns // 1024)
    )
