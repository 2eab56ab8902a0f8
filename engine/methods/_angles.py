"""Coefficients of the methods that interpolate along great circles, from dot products alone.

Whatever such a method makes of vectors x_t lies in their span: it is found as coefficients on the x_t, worked out in
float64 on their dot products, and the vectors themselves are read once more, for one weighted sum.
"""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.add_scaled_rows import add_scaled_rows
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.kernels.weighted_sum import weighted_sum

NO_NORM = 1e-8  # mergekit: a vector as short as this counts as of length 1


def add_combination(
    base: Array | None, arrays: Sequence[Array], numbers: np.ndarray, *, lines: str = "tensor", out: Array
) -> None:
    """Write the combination of the arrays, or of base and task vectors, with coefficients [lines, T]."""
    if len(numbers) != 1 or lines == "column":
        return add_scaled_rows(base, arrays, numbers.T, lines=lines, out=out)
    if base is None:
        return weighted_sum(arrays, numbers[0].tolist(), out=out)
    return add_task_vectors(base, arrays, numbers[0].tolist(), out=out)


def norms(products: np.ndarray) -> np.ndarray:
    """[..., T]: the lengths, from dot products [..., T, T]."""
    return np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))


def slerp(products: np.ndarray, t: float, straight: float) -> np.ndarray:
    """[..., 2]: coefficients of the two vectors at share t of the arc between their directions.

    Args:
        products: [..., 2, 2].
        t: 0 is the first vector, 1 the second.
        straight: where the squared sine of the angle is at most this, the straight line is taken.
    """
    lengths = norms(products)
    lengths = np.where(lengths > NO_NORM, lengths, 1.0)
    cosine = np.clip(products[..., 0, 1] / (lengths[..., 0] * lengths[..., 1]), -1, 1)
    angle = np.arccos(cosine)
    with np.errstate(invalid="ignore", divide="ignore"):
        arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], axis=-1) / np.sin(angle)[..., None]
    return np.where(((1 - cosine) * (1 + cosine) <= straight)[..., None], [1 - t, t], arc)


def multislerp(products: np.ndarray, weights: np.ndarray, eps: float) -> np.ndarray:
    """[T]: coefficients of the point reached on the sphere round the normalised mean direction, times the mean length.

    Raises:
        RecipeError: the directions of three or more vectors cancel.
    """
    lengths = norms(products)
    units = np.diag(1 / (lengths + eps))  # rows: coefficients of the directions
    mean = weights @ units
    size = _length(mean, products)
    if size < eps:
        if len(weights) == 2 or not lengths.any():  # nothing moved: any combination is zero
            return weights
        raise RecipeError("multislerp: the weighted directions cancel, there is no mean direction; change the weights")
    mean = mean / size
    tangent = weights @ (units - np.outer(units @ products @ mean, mean))
    angle = _length(tangent, products) + eps
    return (mean * np.cos(angle) + tangent * (np.sin(angle) / angle)) * (weights @ lengths)


def karcher(products: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """[T]: coefficients of the Karcher mean of the directions, times the mean length."""
    lengths = norms(products)
    present = np.flatnonzero(lengths > tol)
    if len(present) == 0:
        return np.zeros(len(lengths))
    units = np.zeros((len(present), len(lengths)))
    units[np.arange(len(present)), present] = 1 / lengths[present]
    mean = units.mean(axis=0)
    size = _length(mean, products)
    mean = mean / size if size >= tol else units[0]
    for _ in range(max_iter):
        cosines = np.clip(units @ products @ mean, -1, 1)
        angles = np.arccos(cosines)
        far = angles >= tol
        stretch = np.zeros(len(units))
        stretch[far] = angles[far] / np.sin(angles[far])
        tangent = (stretch[:, None] * (units - np.outer(cosines, mean))).mean(axis=0)
        step = _length(tangent, products)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / _length(mean, products)
    return mean * lengths.mean()


def _length(numbers: np.ndarray, products: np.ndarray) -> float:
    return float(np.sqrt(max(numbers @ products @ numbers, 0.0)))
