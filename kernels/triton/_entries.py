"""Entries of sparse rows in Triton: each finds its row by bisection of the offsets, which stay in cache.

Entries rather than rows are shared out, because rows may differ much in their numbers of entries.
"""

import torch
import triton
import triton.language as tl

from freemerge.kernels.array import rows_of

BLOCK = 512
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def entry_places(offsets, columns, entry, inside, rows, width, halvings, BLOCK: tl.constexpr):
    """Where each entry lies in the array, counted along its memory."""
    column = tl.load(columns + entry, mask=inside, other=0).to(tl.int64)
    row = tl.zeros([BLOCK], tl.int64)  # the last one whose offset is not beyond the entry
    beyond = row + rows
    for _ in range(halvings):
        middle = (row + beyond) // 2
        reached = tl.load(offsets + middle, mask=inside, other=0) <= entry
        row = tl.where(reached, middle, row)
        beyond = tl.where(reached, beyond, middle)
    return row * width + column


@triton.jit
def _move_entries_kernel(
    array,
    offsets,
    columns,
    entries,
    count: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    halvings,
    PUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    index = entry_places(offsets, columns, entry, inside, rows, width, halvings, BLOCK)
    if PUT:
        tl.store(array + index, tl.load(entries + entry, mask=inside), mask=inside)
    else:
        tl.store(entries + entry, tl.load(array + index, mask=inside), mask=inside)


def take_entries(array: torch.Tensor, offsets: torch.Tensor, columns: torch.Tensor, entries: torch.Tensor) -> None:
    """entries[i] = what `array` holds at the i-th entry, bit for bit."""
    _move_entries(array, offsets, columns, entries, put=False)


def give_entries(array: torch.Tensor, offsets: torch.Tensor, columns: torch.Tensor, entries: torch.Tensor) -> None:
    """The other way round."""
    _move_entries(array, offsets, columns, entries, put=True)


def _move_entries(array, offsets, columns, entries, *, put: bool) -> None:
    count = entries.numel()
    if count == 0:
        return
    rows, width = rows_of(array.shape)
    bits = BITS[array.dtype.itemsize]
    _move_entries_kernel[(triton.cdiv(count, BLOCK),)](
        array.view(bits),
        offsets,
        columns,
        entries.view(bits),
        count,
        rows,
        width,
        rows.bit_length(),
        PUT=put,
        BLOCK=BLOCK,
        num_warps=4,
    )
