"""all_finite: whether no element of an array is infinite or NaN."""

import numpy as np

from freemerge.kernels.array import Array
from freemerge.kernels.checks import check_float
from freemerge.kernels.dispatch import implementation


def all_finite(array: Array) -> bool:
    """Whether no element is infinite or NaN; at memory speed, without a mask.

    Args:
        array: any shape, any float dtype, contiguous.

    Raises:
        ShapeError: the array is not contiguous or not of a float dtype.
    """
    check_float("array", array)
    run = implementation("all_finite", array) or all_finite_reference
    return run(array)


def all_finite_reference(array: Array) -> bool:
    return bool(np.isfinite(array.astype(np.float64)).all())
