"""fusion_importance: how much each entry of an expert matters: its change, times how its row's distribution changed."""

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, dtype_of, magnitude, rows_of
from freemerge.kernels.checks import check_like
from freemerge.kernels.dispatch import implementation

FLOOR = 1e-8  # added to every probability


def fusion_importance(base: Array, expert: Array, *, out: Array) -> None:
    """Write the magnitude of the task vector times the divergence of the rows, taken as logits.

        p, q = softmax of the row of expert, of base, each + 1e-8;    D = max(0, sum p log(p / q))
        out[i] = |expert[i] - base[i]| * D of the row of i

    Softmax, logarithm and sum are float64: D is the small difference of large terms, and in float32 mostly noise
    (mergekit's float32 can be negative, which D never is). NaN counts as infinite.

    Args:
        base: any shape, any float dtype, contiguous; rows are slices along the last dimension.
        expert: of the shape of `base`, any float dtype.
        out: like `base`, float32.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype.

    Source: mergekit's arcee_fusion, METHODS.md section 15.
    """
    check_like("base", base, expert=expert, out=out)
    if dtype_of(out) != np.float32:
        raise ShapeError(f"out is {out.dtype}; importances are float32")
    run = implementation("fusion_importance", base) or fusion_importance_reference
    run(base, expert, out)


def fusion_importance_reference(base: Array, expert: Array, out: Array) -> None:
    if base.size == 0:
        return
    shape = rows_of(base.shape)
    after, before = (_softmax(array.astype(np.float32).astype(np.float64).reshape(shape)) for array in (expert, base))
    divergence = np.maximum(np.sum(after * np.log(after / before), axis=1, keepdims=True), 0).astype(np.float32)
    out[...] = (magnitude(base, expert).reshape(shape) * divergence).reshape(out.shape)


def _softmax(rows: Array) -> Array:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True) + FLOOR
