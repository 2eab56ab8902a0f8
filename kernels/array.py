"""What an array is: a NumPy array on the CPU, its float dtypes, and conversions every reference shares."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)
FLOATS = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2)


def is_float(dtype: np.dtype) -> bool:
    return np.dtype(dtype) in FLOATS


def task_vector(base: Array | None, expert: Array) -> Array:
    """Expert minus base as float32; formed in float64 first where either is float64. Without base: the expert."""
    if base is None:
        with np.errstate(over="ignore"):
            return expert.astype(np.float32)
    wide = np.float64 if np.float64 in (base.dtype, expert.dtype) else np.float32
    return (expert.astype(wide) - base.astype(wide)).astype(np.float32)


def magnitude(base: Array | None, expert: Array) -> Array:
    """The absolute task vector as float32. NaN counts as infinite, so that it is found among the largest."""
    values = np.abs(task_vector(base, expert))
    return np.where(np.isnan(values), np.float32(np.inf), values)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows an array of this shape has, and how long they are (slices along the last dimension; 0-d: 1 x 1)."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def column_dtype(width: int) -> np.dtype:
    """The narrowest dtype for the columns of rows this long: uint16 or uint32."""
    return np.dtype(np.uint16 if width <= 65536 else np.uint32)


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows: some entries of an array, row after row, columns ascending within a row.

    Attributes:
        offsets: int64 [rows + 1]; the entries of row r are offsets[r] ... offsets[r + 1] - 1.
        columns: uint16 [n] where rows are at most 65536 long, else uint32.
        values: float32 [n]; explicit zeros are allowed.
        shape: of the array the entries belong to; rows are slices along its last dimension.
    """

    offsets: Array
    columns: Array
    values: Array
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def to_dense(self) -> Array:
        """The array of `shape`, float32, zero wherever there is no entry."""
        rows, width = rows_of(self.shape)
        dense = np.zeros((rows, width), np.float32)
        dense[np.repeat(np.arange(rows), np.diff(self.offsets)), self.columns] = self.values
        return dense.reshape(self.shape)


def store(values: Array, out: Array) -> None:
    """Write float32 or float64 values to `out` with one rounding to nearest even."""
    if values.dtype == np.float64 and out.dtype.itemsize < 4:
        values = _to_odd(values)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.reshape(out.shape).astype(out.dtype)


def _to_odd(values: Array) -> Array:
    # float64 to float32 by "round to odd": the rounding to a narrower type that follows is then as good as the only one
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.int32)
    inexact = (nearest.astype(np.float64) != values) & ~np.isnan(values) & (bits & 1 == 0)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(inexact, np.where(away, bits - 1, bits + 1), bits).astype(np.int32).view(np.float32)
