"""add_elected: base plus the sum of the task vectors whose sign won the election, entry by entry."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, store
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def add_elected(
    base: Array, task_vectors: Sequence[Array], weights: Sequence[float], *, scaling: float, normalize: bool, out: Array
) -> None:
    """Write base plus the scaled sum of the weighted task vectors that have the elected sign.

        Y_t = weights[t] * task_vectors[t];    g = +1 where sum_t Y_t >= 0, else -1
        Z = sum of the Y_t with sgn(Y_t) = g;  normalize: Z / sum of the weights[t] of these (of 0: Z)
        out = round( base + scaling * Z )

    A sum of zero elects +; an entry of zero has no sign and never counts; a NaN never counts, but lets - be elected.
    Everything is float32 in the order of `task_vectors`; one rounding. A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous.
        task_vectors: T arrays of the shape of `base`, each of any float dtype. T may be 0.
        weights: T numbers, no unit.
        scaling: the coefficient lambda on the sum.
        normalize: divide by the weights that agree.
        out: like `base`, any float dtype; may be `base` itself.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype, or the weights are not T.

    Source: mergekit's sign consensus (sum); METHODS.md sections 1.6 (llm) and 15 (ties).
    """
    check_like("base", base, task_vectors=task_vectors, out=out)
    check_count("weights", weights, len(task_vectors), "task vectors")
    run = implementation("add_elected", base) or add_elected_reference
    run(base, task_vectors, weights, scaling, normalize, out)


def add_elected_reference(
    base: Array, task_vectors: Sequence[Array], weights: Sequence[float], scaling: float, normalize: bool, out: Array
) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        weighted = [np.float32(w) * vector.astype(np.float32) for w, vector in zip(weights, task_vectors, strict=True)]
        elected = np.where(sum(weighted, np.zeros(base.shape, np.float32)) >= 0, np.float32(1), np.float32(-1))
        total, agreeing = np.zeros(base.shape, np.float32), np.zeros(base.shape, np.float32)
        for weight, values in zip(weights, weighted, strict=True):
            agrees = np.sign(values) == elected
            total += np.where(agrees, values, np.float32(0))
            agreeing += np.where(agrees, np.float32(weight), np.float32(0))
        if normalize:
            total /= np.where(agreeing == 0, np.float32(1), agreeing)
        start = base if base.dtype == np.float64 else base.astype(np.float32)
        store(start + np.float32(scaling) * total, out)
