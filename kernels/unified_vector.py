"""unified_vector: the largest change of any expert that goes the way most of the change goes, and who goes that way."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels._masks import check_mask, pack_mask
from freemerge.kernels.array import Array, store, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.task_vector_statistics import sum_in_order


class UnifiedStatistics(NamedTuple):
    """float64 [T] NumPy arrays: the sums of |tau_t|, and of |masks[t] * U| with U not yet rounded."""

    sum_abs: Array
    kept_abs: Array


def unified_vector(base: Array, experts: Sequence[Array], *, masks: Sequence[Array], out: Array) -> UnifiedStatistics:
    """Write the unified vector U of EMR-Merging and the mask of each expert, in one sweep.

        tau_t = experts[t] - base
        g = +1 where sum_t tau_t > 0, else -1
        U = g * max(0, max_t g * tau_t)          out[i] = round( U[i] ); NaN where the sum is
        masks[t] has the bits where g * tau_t > 0

    Differences and sum are float32, in the order of `experts`; statistics float64, in the order of
    task_vector_statistics.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype. T is at least 1.
        masks: T masks (kernels/_masks.py) over the entries of `base`, to be filled.
        out: of the shape of `base`, any float dtype.

    Raises:
        ShapeError: arrays or masks do not fit together, or there is no expert.

    Source: EMR-Merging, arXiv:2405.17461; METHODS.md section 5.
    """
    check_like("base", base, experts=experts, out=out)
    if not experts:
        raise ShapeError("a unified vector of no expert")
    check_count("masks", masks, len(experts), "experts")
    for t, mask in enumerate(masks):
        check_mask(f"masks[{t}]", mask, base)
    run = implementation("unified_vector", base) or unified_vector_reference
    return UnifiedStatistics(*run(base, experts, masks, out).T)


def unified_vector_reference(base: Array, experts: Sequence[Array], masks: Sequence[Array], out: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        vectors = [task_vector(base, expert) for expert in experts]
        total = sum(vectors[1:], vectors[0])
    positive = total > 0
    largest = np.zeros(base.shape, np.float32)
    for vector in vectors:
        largest = np.fmax(largest, np.where(positive, vector, -vector))
    largest = np.where(np.isnan(total), total, largest)
    sums = np.zeros((len(experts), 2))
    for own, vector, mask in zip(sums, vectors, masks, strict=True):
        kept = np.where(positive, vector > 0, vector < 0)
        mask[...] = pack_mask(kept)
        own[:] = sum_in_order(np.abs(vector)), sum_in_order(np.where(kept, largest, np.float32(0)))
    store(np.where(positive, largest, np.float32(0) - largest), out)  # never -0
    return sums
