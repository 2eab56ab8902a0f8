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
    for expert, (total, total_abs, total_squares, largest) in zip(experts, result[:, :, None], strict=True):
        values = task_vector(base, expert).ravel()
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            lanes = np.zeros((-(-chunk.size // LANES), LANES))
            lanes.ravel()[: chunk.size] = chunk
            total += _sum(lanes)
            total_abs += _sum(np.abs(lanes))
            total_squares += _sum(lanes * lanes)
            largest[...] = np.maximum(largest, np.max(np.abs(lanes)))
    return result


def _sum(lanes: Array) -> np.float64:
    # cumsum, unlike sum, adds strictly in order
    return np.cumsum(np.cumsum(lanes, axis=0)[-1])[-1]
