"""Iso-C: the sum of the task vectors with all its singular values made equal, in matrices; the mean elsewhere."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.methods import Patterns, TensorPlan
from freemerge.methods._linear_algebra import make_isotropic
from freemerge.methods._spectral import merge_spectrally, plan_spectrally
from freemerge.methods._task_vectors import sum_of_task_vectors

SCOPE = "tensor"
SOURCE = "No Task Left Behind, Marczak et al. 2025, arXiv:2502.04959; METHODS.md section 16"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    scaling: float = 1.0,
    averaged: Patterns = (),
    out: Array,
) -> None:
    """Write base + scaling * mean(S) U V^T, where sum_t (experts[t] - base) = U S V^T.

    Singular values of at most 1e-6 of the largest count in the mean, but their directions, which are arbitrary, are
    left out of U V^T (in the sum of LoRA experts, for example).

    Args:
        scaling: the coefficient on the merged task vector.
        averaged: matrices with one of these in their names get the mean task vector, as tensors of other than two
            dimensions do; embeddings, for example.
    """
    merge_spectrally(base, experts, _isotropic_sum, name=name, scaling=scaling, averaged=averaged, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, averaged: Sequence[str], **_) -> TensorPlan:
    return plan_spectrally(name, shape, averaged, dense=2, decompositions=1, transform="isotropic sum")


def _isotropic_sum(base: Array, experts: Sequence[Array]) -> Array:
    total = sum_of_task_vectors(base, experts)
    make_isotropic(total)
    return total
