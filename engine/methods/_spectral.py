"""What iso_c, iso_cts and tsvm share: matrices are merged through their singular vectors, other tensors averaged."""

import math
from collections.abc import Callable, Sequence

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.methods import TensorPlan, matches
from freemerge.methods._linear_algebra import PIECE
from freemerge.methods._task_vectors import DENSE, add_update

DECOMPOSITION = 0.35  # nanoseconds of one core for each n^3: eigenvectors of a float64 matrix of n x n
PRODUCT = 0.05  # nanoseconds of one core for a multiplication and addition of float64


def is_spectral(name: str, shape: tuple[int, ...], averaged: Sequence[str]) -> bool:
    return len(shape) == 2 and 0 not in shape and not matches(name, averaged)


def merge_spectrally(
    base: Array,
    experts: Sequence[Array],
    merge_matrix: Callable[[Array, Sequence[Array]], Array],
    *,
    name: str,
    scaling: float,
    averaged: Sequence[str],
    out: Array,
) -> None:
    """Write base + scaling * merge_matrix(base, experts); the mean task vector where the tensor is not a matrix.

    Args:
        merge_matrix: answers the merged task vector, float32.
    """
    if is_spectral(name, tuple(base.shape), averaged):
        add_update(base, merge_matrix(base, experts), scaling, out=out)
    else:
        add_task_vectors(base, experts, [scaling / len(experts)] * len(experts), out=out)


def plan_spectrally(
    name: str, shape: tuple[int, ...], averaged: Sequence[str], *, dense: int, decompositions: int, transform: str
) -> TensorPlan:
    """The plan of one tensor: `dense` float32 matrices of its size at a time, `decompositions` of its shorter side."""
    if not is_spectral(name, shape, averaged):
        return TensorPlan("merge", "mean", elementwise=True)
    size, n = math.prod(shape), min(shape)
    workspace = DENSE * size * dense + 8 * (4 * n * n + 2 * min(size, PIECE))
    cost = decompositions * (DECOMPOSITION * n**3 + 2 * PRODUCT * n * size)
    return TensorPlan("merge", transform, workspace, cost)
