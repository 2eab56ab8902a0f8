"""DOGE: Task Arithmetic whose task vectors share a shift, optimised so that they conflict less, and are trimmed.

The shift is one for all experts. No data is needed; every matrix is optimised alone.

The variant `official` picks the matrices the official code does, those of a CLIP's vision encoder. Adam's first steps
have the size of the learning rate however small the gradient: where that is rounding alone (float32 here and
officially), the shift is known to 1e-3 of its largest entry. The model is read four times: three sweeps find the
exact thresholds, without sorting or keeping anything.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.methods import Patterns, TensorPlan, matches
from freemerge.methods import _order_statistics as order_statistics
from freemerge.methods._backbone import EMBEDDINGS_AND_HEADS
from freemerge.methods._linear_algebra import triplets
from freemerge.methods._spectral import is_spectral, plan_spectrally
from freemerge.methods._task_vectors import add_update, namespace

SCOPE = "model"
SWEEPS = order_statistics.SWEEPS
SOURCE = "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, Wei et al. 2025, arXiv:2501.01230"
SOURCE += "; METHODS.md section 10"
ALIASES = {"lambda": "scaling", "lamda": "scaling", "lr": "learning_rate", "iters": "steps"}

# The tensors the official code picks, of a CLIP's vision model
VARIANTS = {"official": {"include": ("encoder.*weight", "weight.*encoder"), "exclude": ("layer_norm",)}}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    scaling: float = 0.07,
    density: float = 0.3,
    subspace: float = 6.0,
    steps: int = 400,
    learning_rate: float = 1e-4,
    include: Patterns = ("weight",),
    exclude: Patterns = EMBEDDINGS_AND_HEADS,
    settled: order_statistics.Search,
    out: Array,
) -> None:
    """Write base + sum_t c_t * mask_t * (tau_t + X), with c_t = scaling / norm(tau_t), tau_t = experts[t] - base.

    The shift X minimises sum_t sum_rows <tau_t, tau_t - sum_s c_s (tau_s + X)>^2, by Adam, whose gradient is projected
    out of the space of the leading n / subspace left singular vectors of the task vectors (n: the shorter side), which
    are arbitrary where one expert alone moves. mask_t keeps the entries of tau_t of largest magnitude over all merged
    matrices, ties included.

    Args:
        scaling: the coefficient on task vectors of norm 1.
        density: share of its entries that a task vector keeps, over all matrices (official: K, in percent).
        subspace: the shift may not move in n / subspace directions of the task vectors.
        steps: of Adam.
        learning_rate: of Adam.
        include: merge matrices with one of these in their names; everything else stays as in the base.
        exclude: but not those with one of these; by default embeddings and heads.
    """
    if not _is_merged(name, tuple(base.shape), include, exclude):
        return add_task_vectors(base, [], [], out=out)
    vectors = [task_vector(base, expert) for expert in experts]
    squares = task_vector_statistics(None, vectors).sum_squares.tolist()
    weights = [scaling / math.sqrt(square) if square else 0.0 for square in squares]
    shift = _shift(vectors, weights, _protected(vectors, subspace), steps, learning_rate)
    update = namespace(shift).zeros_like(shift)
    for vector, weight, threshold in zip(vectors, weights, settled.values, strict=True):
        mask = abs(vector) >= threshold
        vector += shift
        vector *= weight
        update += vector * mask
    return add_update(base, update, 1.0, out=out)


def measure_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    include: Sequence[str],
    exclude: Sequence[str],
    settled: order_statistics.Search | None = None,
    **_,
) -> np.ndarray:
    """A sample of the magnitudes, then counts of them."""
    if not _is_merged(name, tuple(base.shape), include, exclude):
        return order_statistics.no_sample(len(experts)) if settled is None else order_statistics.no_counts(settled)
    if settled is None:
        return order_statistics.sample(base, experts)
    return order_statistics.count(base, experts, settled)


def settle(
    statistics: Mapping[str, np.ndarray], *, density: float, settled: order_statistics.Search | None = None, **_
) -> order_statistics.Search:
    """The smallest magnitude that each task vector keeps; by the rule of TIES one entry more than asked."""
    found = statistics.values()
    if settled is None:
        return order_statistics.guessed(found, [max(1, n - int(n * density)) for n in order_statistics.sizes(found)])
    return order_statistics.narrowed(settled, found)


def is_settled(settled: order_statistics.Search) -> bool:
    return settled.complete


def plan_tensor(
    name: str,
    shape: tuple[int, ...],
    *,
    experts: int,
    density: float,
    subspace: float,
    include: Sequence[str],
    exclude: Sequence[str],
    **_,
) -> TensorPlan:
    if not 0 < density <= 1:
        raise RecipeError(f"density is {density}; it is the share of the entries kept, above 0 and at most 1")
    if subspace < 1:
        raise RecipeError(f"subspace is {subspace}; n / subspace directions are at most n: choose 1 or more")
    if not _is_merged(name, shape, include, exclude):
        return TensorPlan("copy", elementwise=True)
    return plan_spectrally(name, shape, (), dense=2 * experts + 7, decompositions=experts + 1, transform="shifted sum")


def _is_merged(name: str, shape: tuple[int, ...], include: Sequence[str], exclude: Sequence[str]) -> bool:
    return is_spectral(name, shape, exclude) and (not include or matches(name, include))


def _protected(vectors: Sequence[Array], subspace: float) -> Array:
    """float32 [H, r]: orthonormal, the leading left singular vectors of those of all task vectors side by side."""
    n = min(vectors[0].shape)
    leading = [triplets(vector, int(n / len(vectors))).left for vector in vectors]
    return triplets(namespace(leading[0]).concatenate(leading, -1), int(n / subspace)).left


def _shift(
    vectors: Sequence[Array], weights: Sequence[float], protected: Array, steps: int, learning_rate: float
) -> Array:
    """X, by Adam (0.9, 0.999, 1e-8) from 0 on; float32 [H, W]."""
    xp, total = namespace(vectors[0]), sum(weights)
    rows = xp.stack(list(vectors), 1)  # [H, T, W]: a row of every task vector
    weighted = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    start = xp.stack([(vector * (vector - weighted)).sum(-1) for vector in vectors], 1)[:, None]  # [H, 1, T]
    shift, mean, square = (xp.zeros_like(weighted) for _ in range(3))
    for step in range(1, steps + 1):
        conflict = start - total * (rows @ shift[:, :, None]).reshape(start.shape)
        gradient = (conflict @ rows)[:, 0]
        gradient *= -2 * total
        gradient -= protected @ (protected.T @ gradient)
        mean *= 0.9
        mean += 0.1 * gradient
        gradient *= gradient
        square *= 0.999
        square += 0.001 * gradient
        size = xp.sqrt(square * (1 / (1 - 0.999**step)), out=gradient)
        size += 1e-8
        xp.divide(mean, size, out=size)
        size *= learning_rate / (1 - 0.9**step)
        shift -= size
    return shift
