"""apply_sparse_rows in Triton: the entries alone are looked at (_entries.py)."""

import torch
import triton
import triton.language as tl

from freemerge.kernels.array import rows_of
from freemerge.kernels.triton._convert import FLOAT8, loadable, narrow, store, widen
from freemerge.kernels.triton._entries import BLOCK, entry_places, take_entries


@triton.jit
def _apply_sparse_rows_kernel(
    array,
    offsets,
    columns,
    values,
    scale,
    start,
    out,
    count: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    halvings,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    value = tl.load(values + entry, mask=inside, other=0.0)
    index = entry_places(offsets, columns, entry, inside, rows, width, halvings, BLOCK)
    changed = inside & (value != 0)
    begin = tl.load(start + entry, mask=changed) if start is not None else tl.load(array + index, mask=changed)
    tl.store(out + index, narrow(widen(begin) + scale * value, out.dtype.element_ty), mask=changed)


def apply_sparse_rows(
    array: torch.Tensor,
    offsets: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    start: torch.Tensor | None,
    out: torch.Tensor,
    kept: torch.Tensor | None,
) -> None:
    if kept is not None:
        take_entries(array, offsets, columns, kept)
    in_place = out.data_ptr() == array.data_ptr() and out.dtype == array.dtype
    rows, width = rows_of(array.shape)
    if out.numel() and not in_place:
        store(array, out)
    count = values.numel()
    if out.numel() == 0 or count == 0:
        return
    # no kernel writes float8: go by float32 and back, which changes no number
    wide = (
        torch.float64 if torch.float64 in (array.dtype, start.dtype if start is not None else None) else torch.float32
    )
    target = out.to(wide) if out.dtype in FLOAT8 else out
    _apply_sparse_rows_kernel[(triton.cdiv(count, BLOCK),)](
        target if in_place else loadable(array),
        offsets,
        columns,
        values,
        float(scale),
        loadable(start),
        target,
        count,
        rows,
        width,
        rows.bit_length(),
        BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the CPU rounds product and sum, too
    )
    store(target, out)
