"""Dense float32 task vectors, one at a time: their running sum, and the step from a merged one to merged weights."""

import sys
from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, dtype_of, is_tensor, store, task_vector
from freemerge.kernels.weighted_sum import weighted_sum

DENSE = 4  # bytes an element of a dense task vector


def namespace(array: Array):
    """numpy or torch: the module whose functions take `array`."""
    return sys.modules["torch"] if is_tensor(array) else np


def sum_of_task_vectors(base: Array, experts: Sequence[Array]) -> Array:
    """float32, added in the order of `experts`; two task vectors are in memory at a time."""
    total = task_vector(base, experts[0])
    for expert in experts[1:]:
        total += task_vector(base, expert)
    return total


def add_update(base: Array, update: Array, scaling: float, *, out: Array) -> None:
    """Write base + scaling * update with one rounding; a float64 base is added in float64.

    Args:
        update: float32, of the shape of `base`, contiguous.
    """
    if dtype_of(base) != np.float64:
        weighted_sum([base, update], [1.0, scaling], out=out)
    elif is_tensor(base):
        out.copy_(base + scaling * update)
    else:
        store(base + scaling * update.astype(np.float64), out)
