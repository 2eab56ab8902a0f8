"""sparse_rows: the entries of largest magnitude of a task vector, as compressed sparse rows."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, SparseRows, column_dtype, magnitude, rows_of, task_vector
from freemerge.kernels.checks import check_magnitude, check_pair
from freemerge.kernels.dispatch import implementation


@dataclass(frozen=True)
class Selection:
    """Entries between two thresholds found elsewhere (magnitude_threshold over many tensors).

    Selected are the entries above `lower` and the first `lower_ties` of those equal to it, without the entries above
    `upper` and the first `upper_ties` of those equal to it. Ties are counted within this tensor: see
    count_magnitudes.allot_ties.
    """

    lower: float
    lower_ties: int
    upper: float = float("inf")
    upper_ties: int = 0


def sparse_rows(
    base: Array | None,
    expert: Array,
    *,
    first: int = 0,
    last: int | None = None,
    scope: Literal["tensor", "row"] = "tensor",
    within: Selection | None = None,
) -> SparseRows:
    """Take the entries of rank first ... last - 1 by magnitude of `expert - base`; rank 0 is the largest.

    Exactly `last - first` entries (in row scope: of each row), explicit zeros among them where nothing else is left.
    Ties: the lower linear index ranks higher. NaN counts as infinite. Values are float32(expert - base).

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        first: how many of the largest entries to leave out.
        last: first to the number of elements (of a row in row scope); needed unless `within` is given.
        scope: rank over the whole tensor or within each row (slices along the last dimension).
        within: instead of ranks, thresholds that hold for more than this tensor.

    Raises:
        ShapeError: arrays do not fit together, or ranks are out of range or missing.

    Source: METHODS.md sections 1.5 and 1.6.
    """
    check_pair(base, expert)
    rows, width = rows_of(expert.shape)
    if within is None:
        most = width if scope == "row" else rows * width
        if last is None or not 0 <= first <= last <= most:
            raise ShapeError(f"ranks first={first} to last={last} of a {scope} of {most} elements")
    elif last is not None or first:
        raise ShapeError("give ranks (first, last) or thresholds (within), not both")
    else:
        check_magnitude(within.lower)
        check_magnitude(within.upper)
    run = implementation("sparse_rows", expert) or sparse_rows_reference
    return SparseRows(*run(base, expert, first, last, scope, within), expert.shape)


def sparse_rows_reference(
    base: Array | None, expert: Array, first: int, last: int | None, scope: str, within: Selection | None
) -> tuple[Array, Array, Array]:
    rows, width = rows_of(expert.shape)
    magnitudes = magnitude(base, expert).reshape(rows, width)
    if within is not None:
        left_out = _upto(magnitudes, within.upper, within.upper_ties)
        chosen = _upto(magnitudes, within.lower, within.lower_ties) & ~left_out
    elif scope == "row":
        chosen = _ranked(magnitudes, first, last)
    else:
        chosen = _ranked(magnitudes.reshape(1, -1), first, last).reshape(rows, width)
    offsets = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))])
    columns = np.nonzero(chosen)[1].astype(column_dtype(width))
    return offsets, columns, task_vector(base, expert).reshape(rows, width)[chosen]


def _ranked(magnitudes: Array, first: int, last: int) -> Array:
    order = np.argsort(-magnitudes, axis=1, kind="stable")
    chosen = np.zeros(magnitudes.shape, bool)
    np.put_along_axis(chosen, order[:, first:last], True, axis=1)
    return chosen


def _upto(magnitudes: Array, value: float, ties: int) -> Array:
    equal = magnitudes == np.float32(value)
    return (magnitudes > np.float32(value)) | (equal & (np.cumsum(equal).reshape(equal.shape) <= ties))
