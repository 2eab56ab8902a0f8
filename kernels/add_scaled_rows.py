"""add_scaled_rows: a weighted sum in which every row, or every column, has weights of its own."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, store, task_vector
from freemerge.kernels.checks import check_against, check_like
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.dot_products import Lines, lines_of


def add_scaled_rows(
    base: Array | None, arrays: Sequence[Array], weights: Array, *, lines: Lines = "row", out: Array
) -> None:
    """Write base plus the task vectors, each line of each multiplied by a weight of its own.

        out[i] = round( base[i] + sum_t weights[t, line of i] * (arrays[t][i] - base[i]) )
        without base: round( sum_t weights[t, line of i] * arrays[t][i] )

    Differences and sum are float32 in the order of `arrays`; one rounding. A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous; or None.
        arrays: T arrays of the shape of `out`, each of any float dtype. T is at least 1.
        weights: [T, lines] NumPy array of numbers; lines as dot_products counts them.
        lines: "row": slices along the last dimension; "column": along the first; "tensor": one line.
        out: any float dtype; may be `base`, or one of the arrays.

    Raises:
        ShapeError: arrays or weights do not fit together.

    Source: METHODS.md section 15 (model_stock, nuslerp).
    """
    check_against(base, arrays)
    check_like("out", out, arrays=list(arrays))
    rows, width = lines_of(out.shape, lines)
    expected = (len(arrays), width if lines == "column" else rows)
    if weights.shape != expected:
        raise ShapeError(f"weights are {list(weights.shape)}; {len(arrays)} arrays have {list(expected)}")
    run = implementation("add_scaled_rows", out) or add_scaled_rows_reference
    run(base, arrays, np.ascontiguousarray(weights, np.float32), lines, out)


def add_scaled_rows_reference(
    base: Array | None, arrays: Sequence[Array], weights: Array, lines: Lines, out: Array
) -> None:
    shape = lines_of(out.shape, lines)
    total = np.zeros(shape, np.float32)
    for own, array in zip(weights, arrays, strict=True):
        total += (own if lines == "column" else own[:, None]) * task_vector(base, array).reshape(shape)
    if base is not None:
        start = base if base.dtype == np.float64 else base.astype(np.float32)
        total = start + total.reshape(out.shape)
    store(total, out)
