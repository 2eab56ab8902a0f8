"""add_expert_products in Triton: a program multiplies a block of rows of all experts of a token with that token.

Neighbouring programs have the same rows and other tokens, so that entries are read from memory once and from cache
after. Which experts a token has is looked up in the kernel: one launch, whatever the batch. Where the entries lie is
sent to the GPU once for a layer: a later call copies nothing from the host, and a CUDA graph can hold it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import FLOAT8, loadable, narrow, store, widen

ROWS, ENTRIES = 32, 16


@triton.jit
def _add_expert_products_kernel(
    x,
    addresses,
    scales,
    weights,
    out,
    n: tl.int64,
    tokens_in_group: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    E,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) % n
    row = tl.program_id(0).to(tl.int64) // n * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros([ROWS], tl.float32)
    used = 0
    for e in range(E):
        weight = tl.load(weights + token // tokens_in_group * E + e)
        if weight != 0:
            used += 1
            offsets = tl.load(addresses + e).to(tl.pointer_type(tl.int64))
            columns = tl.load(addresses + E + e).to(tl.pointer_type(tl.uint32 if WIDE else tl.uint16))
            values = tl.load(addresses + 2 * E + e).to(tl.pointer_type(tl.float32))
            begin = tl.load(offsets + row, mask=inside, other=0)
            end = tl.load(offsets + row + 1, mask=inside, other=0)
            product = tl.zeros([ROWS], tl.float32)
            for first in range(0, tl.max(end - begin), ENTRIES):
                entry = begin[:, None] + first + tl.arange(0, ENTRIES)[None, :]
                there = entry < end[:, None]
                column = tl.load(columns + entry, mask=there, other=0).to(tl.int64)
                number = widen(tl.load(x + token * width + column, mask=there, other=0.0)).to(tl.float32)
                product += tl.sum(tl.load(values + entry, mask=there, other=0.0) * number, axis=1)
            total += weight * tl.load(scales + e) * product
    if used > 0:
        place = out + token * rows + row
        tl.store(place, narrow(widen(tl.load(place, mask=inside)) + total, out.dtype.element_ty), mask=inside)


def add_expert_products(
    x: torch.Tensor,
    offsets: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scales: Sequence[float],
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (n, width), (_, rows) = x.shape, out.shape
    if n == 0 or rows == 0 or not offsets:
        return
    arrays = tuple(array.data_ptr() for part in (offsets, columns, values) for array in part)
    target = out.float() if out.dtype in FLOAT8 else out  # no kernel writes float8
    _add_expert_products_kernel[(n * triton.cdiv(rows, ROWS),)](
        loadable(x),
        _sent(arrays, torch.int64, x.device),
        _sent(tuple(scales), torch.float32, x.device),
        weights,
        target,
        n,
        n // weights.shape[0],
        rows,
        width,
        len(offsets),
        columns[0].dtype == torch.uint32,
        ROWS,
        ENTRIES,
        num_warps=4,
    )
    store(target, out)


@lru_cache(maxsize=4096)
def _sent(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)
