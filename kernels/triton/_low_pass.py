"""The complement form of high_pass on a GPU: what the mask removes, made by two products and taken away.

Triton, for the tensor cores: the few coefficients removed are skinny products of the task vectors with cosines and
sines. Factors are split in three tf32 parts (tf32x3), which keeps the error at that of float32.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from freemerge.kernels.triton._convert import narrow, widen

ROWS, POINTS = 64, 64  # of a tile of the matrix
ENOUGH = 512  # programs that fill any GPU; does not look at the device, so that results do not depend on it


def analyse(base, experts: Sequence, weights: Sequence[float], columns: np.ndarray, spectrum) -> None:
    """Write the chosen coefficients of every row's transform.

        spectrum[s, row] = sum_x delta[row, x] exp(-2 pi i columns[s] x / W)
        delta = sum_t weights[t] * (experts[t] - base)

    Args:
        base: [H, W] float32, bfloat16 or float16; None where `experts` are task vectors themselves.
        experts: T tensors [H, W], at least one.
        columns: [S] integers of 0 ... W // 2.
        spectrum: [S, H, 2] float32, real and imaginary part.
    """
    rows, width = experts[0].shape
    table = _table(width, tuple(columns.tolist()), spectrum.device)
    numbers = min(128, triton.next_power_of_2(table.numbers))
    tiles = triton.cdiv(rows, ROWS), triton.cdiv(table.numbers, numbers)
    parts = max(1, min(8, ENOUGH // (tiles[0] * tiles[1]), width // (4 * POINTS)))  # of a row, where tiles are few
    sums = spectrum[None] if parts == 1 else spectrum.new_empty((parts, *spectrum.shape))
    _analyse_kernel[tiles[0], tiles[1], parts](
        base,
        tuple(experts),
        tuple(map(float, weights)),
        table.roots,
        sums,
        rows,
        width,
        len(columns),
        table.numbers,
        triton.cdiv(triton.cdiv(width, parts), POINTS) * POINTS,
        ROWS=ROWS,
        POINTS=32,
        NUMBERS=numbers,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=False,  # task vectors and their sum are rounded as on the CPU
    )
    if parts > 1:
        torch.sum(sums, 0, out=spectrum)


def synthesise(
    base, experts: Sequence, weights: Sequence[float], columns: np.ndarray, spectrum, add_base: bool, out
) -> None:
    """Write the sum of the task vectors and of the rows that `spectrum` is of.

        out[row, x] = round( base[row, x] + delta[row, x] + low[row, x] )
        low[row, x] = the sum of spectrum[s, row] exp(2 pi i columns[s] x / W) over all s and their mirror images

    Args:
        base, experts, weights, columns, spectrum: as in `analyse`; the coefficients carry sign and normalisation.
        add_base: False leaves the base out of the sum, but for delta.
        out: [H, W] float32, bfloat16 or float16; may be `base` itself.
    """
    rows, width = out.shape
    table = _table(width, tuple(columns.tolist()), spectrum.device)
    _synthesise_kernel[triton.cdiv(width, POINTS), triton.cdiv(rows, ROWS)](
        base,
        tuple(experts),
        tuple(map(float, weights)),
        table.roots,
        table.times,
        spectrum,
        out,
        rows,
        width,
        len(columns),
        table.numbers,
        ADD_BASE=base is not None and add_base,
        ROWS=ROWS,
        POINTS=POINTS,
        NUMBERS=32,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=False,  # task vectors and their sum are rounded as on the CPU
    )


class _Table:
    """Roots of unity for one width and one choice of columns.

    numbers: two for each column, rounded up to a multiple of 16.
    roots: [W, numbers] float32; (cos, -sin) of 2 pi x columns[s] / W at 2 s and 2 s + 1, 0 beyond.
    times: [numbers] float32; 2 for a column whose mirror image is another one, else 1.
    """

    def __init__(self, width: int, columns: tuple[int, ...], device):
        chosen = np.array(columns, np.int64)
        angle = 2 * np.pi / width * (np.arange(width)[:, None] * chosen % width)
        self.numbers = triton.cdiv(2 * len(chosen), 16) * 16
        roots, times = np.zeros((width, self.numbers), np.float32), np.zeros(self.numbers, np.float32)
        roots[:, 0 : 2 * len(chosen) : 2] = np.cos(angle)
        roots[:, 1 : 2 * len(chosen) : 2] = -np.sin(angle)
        times[: 2 * len(chosen)] = np.where(2 * chosen % width == 0, 1, 2).repeat(2)
        self.roots, self.times = (torch.from_numpy(array).to(device) for array in (roots, times))


_table = lru_cache(maxsize=16)(_Table)


@triton.jit
def _task_vectors(base, experts, weights, offset, mask):
    """sum_t weights[t] * (experts[t] - base) of a tile, and the base; float32."""
    start = tl.zeros(offset.shape, tl.float32)
    if base is not None:
        start = widen(tl.load(base + offset, mask=mask, other=0.0))
    total = tl.zeros(offset.shape, tl.float32)
    for t in tl.static_range(len(experts)):
        total += weights[t] * (widen(tl.load(experts[t] + offset, mask=mask, other=0.0)) - start)
    return total, start


@triton.jit
def _analyse_kernel(
    base, experts, weights, roots, sums, rows, width, count, numbers, share,
    ROWS: tl.constexpr, POINTS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    part = tl.program_id(2)
    result = tl.zeros([ROWS, NUMBERS], tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, width), POINTS):
        x = first + tl.arange(0, POINTS)
        inside = (row < rows)[:, None] & (x < width)[None, :]
        delta, _ = _task_vectors(base, experts, weights, row.to(tl.int64)[:, None] * width + x[None, :], inside)
        root = tl.load(
            roots + x[:, None] * numbers + number[None, :],
            mask=(x < width)[:, None] & (number < numbers)[None, :],
            other=0.0,
        )
        result = tl.dot(delta, root, result, input_precision="tf32x3")
    column = number // 2
    target = ((part.to(tl.int64) * count + column[None, :]) * rows + row[:, None]) * 2 + (number % 2)[None, :]
    tl.store(sums + target, result, mask=(row < rows)[:, None] & (column < count)[None, :])


@triton.jit
def _synthesise_kernel(
    base, experts, weights, roots, times, spectrum, out, rows, width, count, numbers,
    ADD_BASE: tl.constexpr, ROWS: tl.constexpr, POINTS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    low = tl.zeros([ROWS, POINTS], tl.float32)
    for first in range(0, numbers, NUMBERS):
        number = first + tl.arange(0, NUMBERS)
        column = number // 2
        coefficients = tl.load(
            spectrum + (column.to(tl.int64)[None, :] * rows + row[:, None]) * 2 + (number % 2)[None, :],
            mask=(row < rows)[:, None] & (column < count)[None, :],
            other=0.0,
        )
        known = number < numbers
        root = tl.load(
            roots + x[None, :] * numbers + number[:, None], mask=(x < width)[None, :] & known[:, None], other=0.0
        )
        coefficients *= tl.load(times + number, mask=known, other=0.0)[None, :]
        low = tl.dot(coefficients, root, low, input_precision="tf32x3")
    offset = row.to(tl.int64)[:, None] * width + x[None, :]
    inside = (row < rows)[:, None] & (x < width)[None, :]
    delta, start = _task_vectors(base, experts, weights, offset, inside)
    low += delta
    if ADD_BASE:
        low += start
    tl.store(out + offset, narrow(low, out.dtype.element_ty), mask=inside)
