"""add_task_vectors: base plus the weighted sum of the task vectors."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, store, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def add_task_vectors(base: Array, experts: Sequence[Array], weights: Sequence[float], *, out: Array) -> None:
    """Write base plus the weighted sum of the task vectors.

        out[i] = round( base[i] + sum_t weights[t] * (experts[t][i] - base[i]) )

    Differences and sum are float32 in the order of `experts`; one rounding, to the dtype of `out`.
    A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype. T may be 0.
        weights: T numbers, no unit; fold the scaling coefficient in.
        out: like `base`, any float dtype; may be `base` itself.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype, or the weights are not T.

    Source: Task Arithmetic, arXiv:2212.04089; METHODS.md section 3.
    """
    check_like("base", base, experts=experts, out=out)
    check_count("weights", weights, len(experts), "experts")
    run = implementation("add_task_vectors", base) or add_task_vectors_reference
    run(base, experts, weights, out)


def add_task_vectors_reference(base: Array, experts: Sequence[Array], weights: Sequence[float], out: Array) -> None:
    total = np.zeros(base.shape, np.float32)
    for weight, expert in zip(weights, experts, strict=True):
        total += np.float32(weight) * task_vector(base, expert)
    start = base if base.dtype == np.float64 else base.astype(np.float32)
    store(start + total, out)
