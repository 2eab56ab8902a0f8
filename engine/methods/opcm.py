"""OPCM: experts one after the other, each only with what is orthogonal to the merge so far, at a constant norm.

The official code rescales the running model after every expert; that changes no direction, so here it is done once, at
the end, and no intermediate model is rounded.

The variant `official` never adds to parameters that lie beside modules (in a CLIP, the class embedding), as the
official code does. The whole model is measured before the first tensor is merged, and as no running model is kept, the
sums are formed twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.methods import Patterns, TensorPlan, matches
from freemerge.methods._linear_algebra import remove_overlap, triplets
from freemerge.methods._spectral import is_spectral, plan_spectrally
from freemerge.methods._task_vectors import DENSE, add_update

SCOPE = "model"
KEEPS_STATE = True
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
    settled: "Settled",
    earlier: Array | None = None,
    kept: Array | None = None,
    out: Array,
) -> None:
    """Write base + Sigma * nbar / norm(Sigma), Sigma the sum of what each expert in turn adds to the ones before.

    Expert t adds C' = U C V^T, where Sigma so far is U S V^T and C = U^T (experts[t] - base) V without its diagonal and
    without the block of the leading directions that make up the share alpha of the sum of S. nbar is the mean norm of
    the task vectors; norms are those of the whole model.

    The running state is left beside a result on disk, 4 bytes an element, and with it experts can be added later:
    `freemerge merge --method opcm --base B --expert NEW --continue-from MERGED` gives the bits of all at once.

    Directions whose singular value is at most 1e-6 of the largest are arbitrary: nothing is taken away along them.

    Args:
        alpha: share of the singular values, from the largest on, whose block of directions is closed to later experts.
        added: matrices with one of these in their names are simply added up, as are tensors that are no matrices; by
            default embeddings.
        rescaled: tensors with one of these in their names keep the first expert's task vector, only rescaled.
    """
    total = kept
    if total is None:
        *_, total = _sums(base, experts, earlier, name, alpha, added, rescaled)
    scale = settled.rescaled_scale if matches(name, rescaled) else settled.scale
    add_update(base, total, scale, out=out)


def measure_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    alpha: float,
    added: Sequence[str],
    rescaled: Sequence[str],
    earlier: Array | None = None,
    kept: Array | None = None,
) -> np.ndarray:
    """[3, T]: squared norms of the task vectors; of the sum after each expert; of a rescaled tensor, instead."""
    own = np.array(task_vector_statistics(base, experts).sum_squares.tolist())
    squares = np.zeros(len(experts))
    for t, total in enumerate(_sums(base, experts, earlier, name, alpha, added, rescaled)):
        squares[t] = task_vector_statistics(None, [total]).sum_squares[0]
    if kept is not None:
        kept[...] = total
    none = np.zeros_like(squares)
    return np.array([own, none, squares] if matches(name, rescaled) else [own, squares, none])


class Settled(NamedTuple):
    """What the sum, and what the first task vector of a rescaled tensor, is multiplied by; the norms of all experts."""

    scale: float
    rescaled_scale: float
    norms: list[float]


def settle(statistics: Mapping[str, np.ndarray], *, earlier: Mapping[str, Any] | None = None, **_) -> Settled:
    """`earlier`, if any, is what `state_facts` said of the experts before."""
    scale, rescaled_scale, norms = 1.0, *((earlier["rescaled_scale"], list(earlier["norms"])) if earlier else (1.0, []))
    for own, sums, rescaled in sum(statistics.values()).T.tolist():
        norms.append(math.sqrt(own))
        if len(norms) > 1:
            norm = math.sqrt(sums + rescaled * rescaled_scale**2)
            scale = float(np.mean(norms)) / norm if norm else 1.0
            rescaled_scale *= scale
    return Settled(scale, rescaled_scale, norms)


def state_facts(settled: Settled) -> dict[str, Any]:
    return {"norms": settled.norms, "rescaled_scale": settled.rescaled_scale}


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, added: Sequence[str], rescaled: Sequence[str], **_
) -> TensorPlan:
    if matches(name, rescaled):
        return TensorPlan("merge", "first expert, rescaled", DENSE * math.prod(shape))
    planned = plan_spectrally(
        name, shape, added, dense=6, decompositions=2 * (experts - 1), transform="orthogonal to the experts before"
    )
    return planned if is_spectral(name, shape, added) else TensorPlan("merge", "sum", 2 * DENSE * math.prod(shape))


def _sums(
    base: Array,
    experts: Sequence[Array],
    earlier: Array | None,
    name: str,
    alpha: float,
    added: Sequence[str],
    rescaled: Sequence[str],
) -> Iterator[Array]:
    """The running sum after each expert, one and the same array; `earlier` is that of the experts before."""
    total = task_vector(base, experts[0]) if earlier is None else task_vector(None, earlier)
    if earlier is None:
        yield total
    for expert in experts[earlier is None :]:
        if not matches(name, rescaled):
            vector = task_vector(base, expert)
            if is_spectral(name, tuple(base.shape), added):
                remove_overlap(vector, triplets(total, min(base.shape)), alpha)
            total += vector
        yield total
