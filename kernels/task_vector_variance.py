"""task_vector_variance: how much the experts disagree about each entry."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, dtype_of, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def task_vector_variance(base: Array, experts: Sequence[Array], *, out: Array) -> None:
    """Write the population variance of the task vectors over the experts, entry by entry.

        m[i] = sum_t x_t[i] / T;    out[i] = sum_t (x_t[i] - m[i])^2 / T,    x_t = experts[t] - base

    Everything is float32 in the order of `experts`.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T >= 1 arrays of the shape of `base`, each of any float dtype.
        out: like `base`, float32.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype.

    Source: SCE, METHODS.md section 15.
    """
    check_like("base", base, experts=experts, out=out)
    if not experts:
        check_count("experts", experts, 1, "variance")
    if dtype_of(out) != np.float32:
        raise ShapeError(f"out is {out.dtype}; variances are float32")
    run = implementation("task_vector_variance", base) or task_vector_variance_reference
    run(base, experts, out)


def task_vector_variance_reference(base: Array, experts: Sequence[Array], out: Array) -> None:
    vectors = [task_vector(base, expert) for expert in experts]
    count = np.float32(len(vectors))
    mean = sum(vectors, np.zeros(base.shape, np.float32)) / count
    out[...] = sum((np.square(vector - mean) for vector in vectors), np.zeros(base.shape, np.float32)) / count
