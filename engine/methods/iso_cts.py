"""Iso-CTS: Iso-C in the space common to all experts, with directions of each expert's own beside it."""

from collections.abc import Sequence

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, task_vector
from freemerge.methods import Patterns, TensorPlan
from freemerge.methods._linear_algebra import Triplets, orthogonalized, remove_columns_in, stacked, triplets
from freemerge.methods._spectral import merge_spectrally, plan_spectrally
from freemerge.methods._task_vectors import namespace, sum_of_task_vectors

SCOPE = "tensor"
SOURCE = "No Task Left Behind, Marczak et al. 2025, arXiv:2502.04959; METHODS.md section 16"
ALIASES = {"lambda": "scaling", "common_space_fraction": "common"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    scaling: float = 1.0,
    common: float = 0.8,
    averaged: Patterns = (),
    out: Array,
) -> None:
    """Write base + scaling * mean(s) polar(A) polar(B)^T.

    A, s and B hold side by side the leading singular triplets of every expert's task vector after what lies in the
    common space has been removed from its columns, and those of the common space: the leading triplets of the sum of
    the task vectors. Tensors of other than two dimensions get the mean task vector, times scaling.

    Directions whose singular value is at most 1e-6 of the largest are left out; an expert's own, at most 1e-6 of the
    norm of its task vector.

    Args:
        scaling: the coefficient on the merged task vector.
        common: share of the n directions (the shorter side of the matrix) that are common, 0 to 1; rounded so that
            the experts share the rest evenly.
        averaged: matrices with one of these in their names get the mean task vector too; embeddings, for example.
    """

    def merge_matrix(base: Array, experts: Sequence[Array]) -> Array:
        return _merge_matrix(base, experts, common)

    merge_spectrally(base, experts, merge_matrix, name=name, scaling=scaling, averaged=averaged, out=out)


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, common: float, averaged: Sequence[str], **_
) -> TensorPlan:
    if not 0 <= common <= 1:
        raise RecipeError(f"common is {common}; it is a share of the directions, from 0 to 1")
    shared, own = _ranks(min(shape, default=0), experts, common)
    transform = f"isotropic: {shared} common singular vectors, {own} of each expert"
    return plan_spectrally(name, shape, averaged, dense=4, decompositions=experts + 3, transform=transform)


def _ranks(n: int, experts: int, common: float) -> tuple[int, int]:
    """How many directions are common, how many are each expert's."""
    shared = max(0, n - experts * round((n - int(n * common)) / experts))
    return shared, (n - shared) // experts


def _merge_matrix(base: Array, experts: Sequence[Array], common: float) -> Array:
    shared, own = _ranks(min(base.shape), len(experts), common)
    space = triplets(sum_of_task_vectors(base, experts), shared)
    parts = stacked([*(_own(base, expert, space, own) for expert in experts), space])
    return orthogonalized(parts, namespace(parts.values).full_like(parts.values, parts.values.mean()))


def _own(base: Array, expert: Array, space: Triplets, rank: int) -> Triplets:
    vector = task_vector(base, expert)
    norm = float(namespace(vector).linalg.norm(vector))
    remove_columns_in(vector, space.left)
    return triplets(vector, rank, scale=norm)  # of what lies in the common space only rounding is left
