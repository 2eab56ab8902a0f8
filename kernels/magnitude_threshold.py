"""magnitude_threshold: the exact k-th largest magnitude of task vectors."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, magnitude, numel, rows_of
from freemerge.kernels.checks import check_count, check_pair
from freemerge.kernels.dispatch import implementation


class Threshold(NamedTuple):
    """The rank-th largest magnitude: `greater + ties = rank`, where `greater` counts the entries above `values`.

    values: float32 [rows], or [1] in model scope.
    ties: int64, of the same length: how many of the entries equal to the value belong to the first `rank`.
    """

    values: Array
    ties: Array


def magnitude_threshold(
    bases: Sequence[Array | None], experts: Sequence[Array], rank: int, *, scope: Literal["model", "row"] = "model"
) -> Threshold:
    """Find the rank-th largest |expert - base|, counted from 1.

    Exact, by histograms of the bits of the float32 magnitudes: nothing is sorted or copied, inputs are read twice.
    NaN counts as infinite. Rank 0 gives (inf, 0): no entry belongs to the first 0.

    Args:
        bases: arrays of any float dtype and shape, contiguous; None where the expert is a task vector itself.
        experts: as many arrays, each of the shape of its base.
        rank: 0 to the number of elements (of all arrays in model scope, of a row in row scope).
        scope: "model": one threshold over all the arrays together (one array: tensor scope);
            "row": one for each row of a single array.

    Raises:
        ShapeError: arrays do not fit together, or rank is out of range.

    Source: METHODS.md sections 0, 1.5 and 2.
    """
    check_count("experts", experts, len(bases), "bases")
    for base, expert in zip(bases, experts, strict=True):
        check_pair(base, expert)
    if scope == "row":
        check_count("arrays", experts, 1, "row scope")
        check_rank("rank", rank, rows_of(experts[0].shape)[1], "a row")
    else:
        check_rank("rank", rank, sum(map(numel, experts)), "all arrays")
    run = implementation("magnitude_threshold", experts[0] if experts else None) or magnitude_threshold_reference
    return Threshold(*run(bases, experts, rank, scope))


def check_rank(name: str, rank: int, most: int, of: str) -> None:
    if not 0 <= rank <= most:
        raise ShapeError(f"{name} {rank}, but {of} has {most} elements")


def magnitude_threshold_reference(
    bases: Sequence[Array | None], experts: Sequence[Array], rank: int, scope: str
) -> tuple[Array, Array]:
    magnitudes = [magnitude(base, expert) for base, expert in zip(bases, experts, strict=True)]
    if scope == "row":
        rows = magnitudes[0].reshape(rows_of(experts[0].shape))
    else:
        rows = np.concatenate([np.zeros(0, np.float32), *(values.ravel() for values in magnitudes)])[None]
    if rank == 0:
        return np.full(len(rows), np.inf, np.float32), np.zeros(len(rows), np.int64)
    values = np.sort(rows, axis=1)[:, ::-1][:, rank - 1]
    return values, rank - np.sum(rows > values[:, None], axis=1)
