"""OPCM: experts one after the other, each only with what is orthogonal to the merge so far, at a constant norm.

The official code rescales the running model after every expert; that changes no direction, so here it is done once, at
the end, and no intermediate model is rounded.

The variant `official` never adds to parameters that lie beside modules (in a CLIP, the class embedding), as the
official code does. The whole model is measured before the first tensor is merged, and as no running model is kept, the
sums are formed twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.methods import Patterns, TensorPlan, matches
from freemerge.methods._linear_algebra import remove_overlap, triplets
from freemerge.methods._spectral import is_spectral, plan_spectrally
from freemerge.methods._task_vectors import DENSE, add_update

SCOPE = "model"
SOURCE = "Merging Models on the Fly, Tang et al. 2025, arXiv:2501.09522; METHODS.md section 9"
EMBEDDINGS = ("embed", r"(^|\.)(wte|wpe|shared)\.")

# The official code never adds to parameters that lie beside modules, such as a CLIP's class_embedding; it rescales them
VARIANTS = {"official": {"rescaled": ("class_embedding",)}}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    alpha: float = 0.5,
    added: Patterns = EMBEDDINGS,
    rescaled: Patterns = (),
    settled: tuple[float, float],
    out: Array,
) -> None:
    """Write base + Sigma * nbar / norm(Sigma), Sigma the sum of what each expert in turn adds to the ones before.

    Expert t adds C' = U C V^T, where Sigma so far is U S V^T and C = U^T (experts[t] - base) V without its diagonal and
    without the block of the leading directions that make up the share alpha of the sum of S. nbar is the mean norm of
    the task vectors; norms are those of the whole model.

    Directions whose singular value is at most 1e-6 of the largest are arbitrary: nothing is taken away along them.

    Args:
        alpha: share of the singular values, from the largest on, whose block of directions is closed to later experts.
        added: matrices with one of these in their names are simply added up, as are tensors that are no matrices; by
            default embeddings.
        rescaled: tensors with one of these in their names keep the first expert's task vector, only rescaled.
    """
    scale, rescaled_scale = settled
    if matches(name, rescaled):
        return add_update(base, task_vector(base, experts[0]), rescaled_scale, out=out)
    *_, total = _sums(base, experts, name, alpha, added)
    return add_update(base, total, scale, out=out)


def measure_tensor(
    base: Array, experts: Sequence[Array], *, name: str, alpha: float, added: Sequence[str], rescaled: Sequence[str]
) -> np.ndarray:
    """[3, T]: squared norms of the task vectors; of the sum after each expert; of a rescaled tensor."""
    own = np.array(task_vector_statistics(base, experts).sum_squares.tolist())
    if matches(name, rescaled):
        return np.array([own, own * 0, own])
    sums = [
        float(task_vector_statistics(None, [total]).sum_squares[0])
        for total in _sums(base, experts, name, alpha, added)
    ]
    return np.array([own, sums, own * 0])


def settle(statistics: Mapping[str, np.ndarray], **_) -> tuple[float, float]:
    """What the sum, and what the first task vector of a rescaled tensor, is multiplied by."""
    own, sums, rescaled = np.array(list(statistics.values())).sum(0)
    norms = np.sqrt(own)
    scale = rescaled_scale = 1.0
    for t in range(1, len(norms)):
        norm = math.sqrt(sums[t] + rescaled[0] * rescaled_scale**2)
        scale = float(norms[: t + 1].mean()) / norm if norm else 1.0
        rescaled_scale *= scale
    return scale, rescaled_scale


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, added: Sequence[str], rescaled: Sequence[str], **_
) -> TensorPlan:
    if matches(name, rescaled):
        return TensorPlan("merge", "first expert, rescaled", DENSE * math.prod(shape))
    planned = plan_spectrally(
        name, shape, added, dense=6, decompositions=2 * (experts - 1), transform="orthogonal to the experts before"
    )
    return planned if is_spectral(name, shape, added) else TensorPlan("merge", "sum", 2 * DENSE * math.prod(shape))


def _sums(base: Array, experts: Sequence[Array], name: str, alpha: float, added: Sequence[str]) -> Iterator[Array]:
    """The sum after each expert, float32: one array that grows."""
    total = task_vector(base, experts[0])
    yield total
    for expert in experts[1:]:
        vector = task_vector(base, expert)
        if is_spectral(name, tuple(base.shape), added):
            remove_overlap(vector, triplets(total, min(base.shape)), alpha)
        total += vector
        yield total
