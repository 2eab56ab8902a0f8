"""weighted_sum: the weighted sum of arrays, without a base."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, store
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def weighted_sum(arrays: Sequence[Array], weights: Sequence[float], *, out: Array) -> None:
    """Write the weighted sum of arrays.

        out[i] = round( sum_t weights[t] * arrays[t][i] )

    The sum is float32 in the order of `arrays`; one rounding, to the dtype of `out`.

    Args:
        arrays: T arrays of one shape, each of any float dtype, contiguous.
        weights: T numbers, no unit.
        out: of the same shape, any float dtype; may be one of `arrays`.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype, or the weights are not T.

    Source: model soups, arXiv:2203.05482; METHODS.md section 3.
    """
    check_like("out", out, arrays=arrays)
    check_count("weights", weights, len(arrays), "arrays")
    run = implementation("weighted_sum", out) or weighted_sum_reference
    run(arrays, weights, out)


def weighted_sum_reference(arrays: Sequence[Array], weights: Sequence[float], out: Array) -> None:
    total = np.zeros(out.shape, np.float32)
    for weight, array in zip(weights, arrays, strict=True):
        total += np.float32(weight) * array.astype(np.float32)
    store(total, out)
