"""add_masked_vector in Triton: elementwise, bound by memory."""

import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import loadable, narrow, storable, store, widen
from freemerge.kernels.triton._masks import ROWS, entries, load_bytes, unpack


@triton.jit
def _add_masked_vector_kernel(array, vector, mask, scale, out, n: tl.int64, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (ROWS * 8)
    lane = entries(ROWS)
    inside = first + lane < n
    start = tl.load(array + first + lane, mask=inside)
    added = tl.load(vector + first + lane, mask=inside)
    kept = unpack(load_bytes(mask, first, n, ROWS)) != 0
    start = widen(start)
    result = tl.where(kept, start + scale * widen(added).to(tl.float32), start)
    tl.store(out + first + lane, narrow(result, out.dtype.element_ty), mask=inside)


def add_masked_vector(
    array: torch.Tensor, vector: torch.Tensor, mask: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    if n := out.numel():
        array, target = loadable(array), storable(out, array)
        _add_masked_vector_kernel[(triton.cdiv(n, ROWS * 8),)](
            array,
            loadable(vector),
            mask,
            float(scale),
            target,
            n,
            ROWS,
            num_warps=4,
            enable_fp_fusion=False,  # the CPU rounds product and sum, too
        )
        store(target, out)
