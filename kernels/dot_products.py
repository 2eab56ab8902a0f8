"""dot_products: the dot products of all pairs of task vectors, or of arrays themselves."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from freemerge.kernels.array import Array, rows_of, task_vector
from freemerge.kernels.checks import check_against, check_like
from freemerge.kernels.dispatch import implementation

Lines: TypeAlias = Literal["tensor", "row", "column"]


def dot_products(base: Array | None, arrays: Sequence[Array], *, lines: Lines = "tensor") -> Array:
    """Measure lengths and angles: the Gram matrix of float32(arrays[t] - base).

        result[l, s, t] = sum over the entries of line l of x_s * x_t

    Products and sums are float64. The sums do not depend on the number of threads.

    Args:
        base: any float dtype and shape, contiguous; None where the arrays are meant themselves.
        arrays: T arrays of one shape, that of `base`, each of any float dtype. T is at least 1.
        lines: "tensor": all entries are one line; "row": slices along the last dimension; "column": along the first.

    Returns:
        float64 [lines, T, T], a NumPy array wherever `arrays` are.

    Raises:
        ShapeError: arrays do not fit together.

    Source: METHODS.md section 15 (model_stock, slerp, nuslerp, multislerp, karcher).
    """
    check_against(base, arrays)
    check_like("arrays[0]", arrays[0], arrays=list(arrays))
    run = implementation("dot_products", arrays[0]) or dot_products_reference
    return run(base, arrays, lines)


def lines_of(shape: tuple[int, ...], lines: Lines) -> tuple[int, int]:
    """The matrix of which the lines are rows or columns; (1, n) for the whole tensor. Vectors are one line."""
    if lines == "row" and len(shape) > 1:
        return rows_of(shape)
    if lines == "column" and len(shape) > 1:
        return shape[0], int(np.prod(shape[1:], dtype=np.int64))
    return (1, int(np.prod(shape, dtype=np.int64))) if lines != "column" else (int(np.prod(shape, dtype=np.int64)), 1)


def dot_products_reference(base: Array | None, arrays: Sequence[Array], lines: Lines) -> Array:
    shape = lines_of(arrays[0].shape, lines)
    vectors = np.stack([task_vector(base, array).astype(np.float64).reshape(shape) for array in arrays])
    return np.einsum("srw,trw->wst" if lines == "column" else "srw,trw->rst", vectors, vectors)
