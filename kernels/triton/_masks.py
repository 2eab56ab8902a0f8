"""Masks of one bit an entry (kernels/_masks.py) in Triton: a tile is [ROWS, 8], a row a byte of the mask.

A thread then has the eight entries of a byte, 16 bytes of bfloat16, and no index is divided.
"""

import torch
import triton
import triton.language as tl

ROWS = 128  # a thread each


@triton.jit
def entries(ROWS: tl.constexpr):
    """int32 [ROWS, 8]: the entries of a tile, counted from its first."""
    return tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def load_bytes(mask, first, n, ROWS: tl.constexpr):
    """uint8 [ROWS]: the bytes of the tile that begins with entry `first`; 0 behind the last, n. None: all bits."""
    if mask is None:
        return tl.full([ROWS], 255, tl.uint8)
    else:
        row = tl.arange(0, ROWS)
        return tl.load(mask + first // 8 + row, mask=first + row * 8 < n, other=0)


@triton.jit
def unpack(byte):
    """[ROWS] bytes as [ROWS, 8] of 0 and 1, int32."""
    return (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def store_bits(mask, first, n, kept, ROWS: tl.constexpr):
    """Write the bytes of a tile: `kept` is int32 [ROWS, 8] of 0 and 1, and 0 behind the last entry."""
    row = tl.arange(0, ROWS)
    byte = tl.sum(kept << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask + first // 8 + row, byte.to(tl.uint8), mask=first + row * 8 < n)


@triton.jit
def _pack_kernel(kept, mask, n: tl.int64, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (ROWS * 8)
    lane = entries(ROWS)
    bits = tl.load(kept + first + lane, mask=first + lane < n, other=0).to(tl.int32)
    store_bits(mask, first, n, bits, ROWS)


def pack(kept: torch.Tensor, mask: torch.Tensor) -> None:
    """Write the mask of a contiguous uint8 tensor of 0 and 1."""
    if n := kept.numel():
        _pack_kernel[(triton.cdiv(n, ROWS * 8),)](kept, mask, n, ROWS, num_warps=4)
