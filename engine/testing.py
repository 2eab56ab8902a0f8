"""For tests and benchmarks: poisoned outputs, random arrays of any dtype, comparisons with a reason."""

import numpy as np

from freemerge.kernels import dispatch
from freemerge.kernels.array import FLOATS, Array, store

__all__ = ["FLOATS", "poisoned", "random_array", "versions"]


def random_array(shape, dtype, seed: int, scale: float = 1.0) -> Array:
    """Normal numbers times `scale`, rounded to `dtype`."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float64) * scale
    out = np.empty(shape, dtype)
    store(values, out)
    return out


def poisoned(shape, dtype) -> Array:
    """An array of NaN: an element nobody wrote cannot pass for a result."""
    return np.full(shape, np.nan, dtype)


def versions(op: str) -> list[str]:
    """The compiled versions of `op` there are on this machine, by name."""
    return ["cpu"] if hasattr(dispatch._cpu, op) else []
