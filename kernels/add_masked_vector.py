"""add_masked_vector: add a vector to an array where a mask has a bit."""

import numpy as np

from freemerge.kernels._masks import check_mask, unpack_mask
from freemerge.kernels.array import Array, store
from freemerge.kernels.checks import check_like
from freemerge.kernels.dispatch import implementation


def add_masked_vector(array: Array, vector: Array, mask: Array, scale: float, *, out: Array) -> None:
    """Write `array` with the masked vector added to it.

        out[i] = round( array[i] + scale * vector[i] )    where the mask has a bit
        out[i] = round( array[i] )                        elsewhere

    Product and sum are float32, one rounding to the dtype of `out`. A float64 `array` is added to in float64.

    Args:
        array: any shape, any float dtype, contiguous.
        vector: of the shape of `array`, any float dtype; what has no bit may be NaN.
        mask: a mask (kernels/_masks.py) over the entries of `array`.
        scale: no unit.
        out: like `array`, any float dtype; may be `array` itself.

    Raises:
        ShapeError: arrays and mask do not fit together.

    Source: EMR-Merging and TALL masks; METHODS.md sections 5 and 16.
    """
    check_like("array", array, vector=vector, out=out)
    check_mask("mask", mask, array)
    run = implementation("add_masked_vector", array) or add_masked_vector_reference
    run(array, vector, mask, scale, out)


def add_masked_vector_reference(array: Array, vector: Array, mask: Array, scale: float, out: Array) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        added = np.float32(scale) * vector.astype(np.float32)
        # adding -0 changes nothing, not even the sign of a zero
        added = np.where(unpack_mask(mask, array.shape), added, np.float32(-0.0))
        store((array if array.dtype == np.float64 else array.astype(np.float32)) + added, out)
