"""What an array is: a NumPy array on the CPU, its float dtypes, and conversions every reference shares."""

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


def task_vector(base: Array, expert: Array) -> Array:
    """Expert minus base as float32; formed in float64 first where either is float64."""
    wide = np.float64 if np.float64 in (base.dtype, expert.dtype) else np.float32
    return (expert.astype(wide) - base.astype(wide)).astype(np.float32)


def store(values: Array, out: Array) -> None:
    """Write float32 or float64 values to `out` with one rounding to nearest even."""
    if values.dtype == np.float64 and out.dtype.itemsize < 4:
        values = _to_odd(values)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.reshape(out.shape).astype(out.dtype)


def _to_odd(values: Array) -> Array:
    # float64 to float32 by "round to odd", so that the rounding to a narrower type that follows is as good as the only one
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.int32)
    inexact = (nearest.astype(np.float64) != values) & ~np.isnan(values) & (bits & 1 == 0)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(inexact, np.where(away, bits - 1, bits + 1), bits).astype(np.int32).view(np.float32)
