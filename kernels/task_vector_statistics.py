"""task_vector_statistics: sum, sum of magnitudes, sum of squares and largest magnitude of each task vector."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.checks import check_against
from freemerge.kernels.dispatch import implementation

CHUNK = 65536  # elements; sums are formed per chunk, in LANES partial sums each, and chunks added in order
LANES = 16


class TaskVectorStatistics(NamedTuple):
    """float64 arrays of [T]."""

    sum: Array
    sum_abs: Array
    sum_squares: Array
    max_abs: Array


def task_vector_statistics(base: Array | None, experts: Sequence[Array]) -> TaskVectorStatistics:
    """Measure each task vector in one sweep.

        sum_i tau_t[i],  sum_i |tau_t[i]|,  sum_i tau_t[i]^2,  max_i |tau_t[i]|        tau_t = experts[t] - base

    Differences are float32, sums float64 in a fixed order: the same bits for any number of threads, on any processor.
    A GPU adds in another fixed order, the same on every GPU: sums of magnitudes and squares agree to 1e-12 relative.
    A NaN in a task vector makes its statistics NaN. All are 0 for an empty array.

    Args:
        base: any shape, any float dtype, contiguous; None where `experts` are task vectors themselves.
        experts: T arrays of the shape of `base` (without base: of any shapes), each of any float dtype.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype.

    Source: METHODS.md sections 1.3, 1.4 and 1.6.
    """
    check_against(base, experts)
    run = implementation("task_vector_statistics", experts[0] if experts else base) or task_vector_statistics_reference
    return TaskVectorStatistics(*run(base, experts).T)


def task_vector_statistics_reference(base: Array | None, experts: Sequence[Array]) -> Array:
    result = np.zeros((len(experts), 4))
    for expert, statistics in zip(experts, result, strict=True):
        values = task_vector(base, expert)
        largest = np.max(np.abs(values), initial=0.0)
        statistics[:] = sum_in_order(values), sum_in_order(np.abs(values)), sum_in_order(values, squares=True), largest
    return result


def sum_in_order(values: Array, *, squares: bool = False) -> float:
    """The sum of float32 values, or of their squares, as every compiled op forms it: by chunks, by lanes within one."""
    total, values = 0.0, values.reshape(-1)
    for start in range(0, values.size, CHUNK):
        chunk = values[start : start + CHUNK]
        lanes = np.zeros((-(-chunk.size // LANES), LANES))
        lanes.ravel()[: chunk.size] = chunk
        # cumsum, unlike sum, adds strictly in order
        total += np.cumsum(np.cumsum(lanes * lanes if squares else lanes, axis=0)[-1])[-1]
    return total
