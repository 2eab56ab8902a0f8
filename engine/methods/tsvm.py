"""TSV-M: the leading singular vectors of every task vector, made orthogonal to each other, in matrices."""

from collections.abc import Sequence

from freemerge.kernels.array import Array, task_vector
from freemerge.methods import Patterns, TensorPlan
from freemerge.methods._linear_algebra import orthogonalized, stacked, triplets
from freemerge.methods._spectral import merge_spectrally, plan_spectrally

SCOPE = "tensor"
SOURCE = "Task Singular Vectors, Gargiulo et al. 2024, arXiv:2412.00081; METHODS.md section 16"
ALIASES = {"lambda": "scaling", "alpha": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    scaling: float = 1.0,
    averaged: Patterns = (),
    out: Array,
) -> None:
    """Write base + scaling * polar(A) diag(s) polar(B)^T.

    A, s and B hold side by side the first int(n * (1 / T)) left singular vectors, singular values and right singular
    vectors of each task vector, n the shorter side of the matrix. polar(A) are the orthonormal columns nearest to A.
    Tensors of other than two dimensions get the mean task vector, times scaling.

    Args:
        scaling: the coefficient on the merged task vector.
        averaged: matrices with one of these in their names get the mean task vector too; embeddings, for example.
    """
    merge_spectrally(base, experts, _orthogonal_sum, name=name, scaling=scaling, averaged=averaged, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, averaged: Sequence[str], **_) -> TensorPlan:
    return plan_spectrally(
        name,
        shape,
        averaged,
        dense=3,
        decompositions=experts + 2,
        transform=f"{_rank(min(shape, default=0), experts)} singular vectors of each expert, orthogonalized",
    )


def _rank(n: int, experts: int) -> int:
    return int(n * (1 / experts))  # as the official code: for some T, 49 for one, it can be one less than n // T


def _orthogonal_sum(base: Array, experts: Sequence[Array]) -> Array:
    rank = _rank(min(base.shape), len(experts))
    parts = stacked([triplets(task_vector(base, expert), rank) for expert in experts])
    return orthogonalized(parts, parts.values)
