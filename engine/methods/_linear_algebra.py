"""Singular vectors and polar factors of matrices, by NumPy's LAPACK on the CPU and torch.linalg on a GPU.

Everything goes through the float64 Gram matrix of the shorter side, formed in pieces, and its eigenvectors, which
take a third to a seventh of the time of a singular value decomposition. The relative error of a singular direction is
about 2e-16 * (S[0] / s)**2; that of a float32 decomposition, 6e-8 * (S[0] / s), is larger wherever
s > NEGLIGIBLE * S[0]. Smaller ones are no more than the rounding of the weights: the methods leave them out
(METHODS.md section 16).

A matrix is H x W, n its shorter side, float32; it may be a view.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from freemerge.kernels.array import Array, empty
from freemerge.methods._task_vectors import namespace

NEGLIGIBLE = 1e-6  # of the largest singular value: a direction at or below it has none
PIECE = 1 << 22  # elements of a matrix that are in float64 at a time


class Triplets(NamedTuple):
    """Singular triplets of a matrix, largest first; negligible ones are zero in all three.

    left: float32 [H, r]. values: float64 [r]. right: float32 [W, r].
    """

    left: Array
    values: Array
    right: Array


def triplets(matrix: Array, rank: int, *, scale: float | None = None) -> Triplets:
    """The `rank` leading singular triplets; `scale`, not its largest singular value, says what is negligible."""
    tall = _tall(matrix)
    squares, vectors = _eigen(gram(tall))
    values, inverse = (roots[:rank] for roots in _roots(squares, scale))
    vectors = vectors[:, :rank] * (inverse != 0)
    long = product(tall, vectors * inverse)
    short = _float32(vectors)
    values = values * (inverse != 0)
    return Triplets(long, values, short) if tall is matrix else Triplets(short, values, long)


def stacked(parts: Sequence[Triplets]) -> Triplets:
    """The triplets of several matrices side by side."""
    xp = namespace(parts[0].values)
    return Triplets(*(xp.concatenate(one, -1) for one in zip(*parts, strict=True)))


def make_isotropic(matrix: Array) -> None:
    """Replace a matrix in place by its polar factor U V^T times its mean singular value.

    The factor has the directions that are not negligible; the mean is that of all n singular values.
    """
    tall = _tall(matrix)
    squares, vectors = _eigen(gram(tall))
    values, inverse = _roots(squares)
    product(tall, (vectors * (inverse * values.mean())) @ vectors.T, out=tall)


def remove_columns_in(matrix: Array, basis: Array) -> None:
    """Project the columns of a matrix, in place, on the complement of the space of the orthonormal `basis` [H, r]."""
    coordinates = basis.T @ matrix
    for rows in _runs(matrix):
        matrix[rows] -= basis[rows] @ coordinates


def remove_overlap(matrix: Array, directions: Triplets, share: float) -> None:
    """Take away from a matrix, in place, u_i (u_i^T matrix v_j) v_j^T for all i, j < p, and for all i = j.

    p is the number of leading directions whose values together are at most `share` of the sum of all; 0 if that is all.
    """
    left, values, right = directions
    xp = namespace(values)
    sums = xp.cumsum(values, 0)
    p = int((sums <= share * sums[-1]).sum()) % len(values)
    overlap = left.T @ matrix @ right
    removed = xp.diag(xp.diagonal(overlap))
    removed[:p, :p] = overlap[:p, :p]
    removed = left @ removed
    for rows in _runs(matrix):
        matrix[rows] -= removed[rows] @ right.T


def orthogonalized(parts: Triplets, values: Array) -> Array:
    """float32 [H, W]: polar(left) diag(values) polar(right)^T, the columns of both sides made orthonormal together.

    A direction in which the columns of a side are negligible, because several tasks share it, has no polar factor and
    is left out.
    """
    left, _, right = parts
    core = (_inverse_root(gram(left)) * values) @ _inverse_root(gram(right))
    out = _new(len(left), len(right), left)
    if len(left) > len(right):
        product(left, core @ _float64(right).T, out=out)
    else:
        product(right, core.T @ _float64(left).T, out=out.T)
    return out


def gram(matrix: Array) -> Array:
    """float64 [W, W]: the inner products of the columns."""
    return sum(piece.T @ piece for _, piece in _pieces(matrix))


def product(matrix: Array, other: Array, out: Array | None = None) -> Array:
    """float32 [H, r]: matrix @ other, float64 within; `other` is float64 [W, r], `out` may be `matrix` where r is W."""
    if out is None:
        out = _new(len(matrix), other.shape[1], matrix)
    for rows, piece in _pieces(matrix):
        out[rows] = piece @ other
    return out


def _tall(matrix: Array) -> Array:
    return matrix if matrix.shape[0] > matrix.shape[1] else matrix.T


def _pieces(matrix: Array) -> Iterator[tuple[slice, Array]]:
    return ((rows, _float64(matrix[rows])) for rows in _runs(matrix))


def _runs(matrix: Array) -> Iterator[slice]:
    step = max(1, PIECE // max(1, matrix.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(matrix), step))


def _eigen(square: Array) -> tuple[Array, Array]:
    # of a symmetric matrix, largest first; NaN where it is not finite, for which LAPACK has only an error
    xp = namespace(square)
    if not xp.isfinite(square).all():
        return square[0] * xp.nan, square * xp.nan
    values, vectors = xp.linalg.eigh(-square)  # in ascending order
    return -values, vectors


def _roots(squares: Array, scale: float | None = None) -> tuple[Array, Array]:
    # singular values from their squares; and their inverses, 0 where they are negligible
    xp = namespace(squares)
    values = xp.sqrt(xp.clip(squares, 0, None))
    kept = ~(values <= NEGLIGIBLE * (values[:1] if scale is None else scale))  # so that NaN stays
    return values, kept / xp.where(kept, values, xp.ones_like(values))


def _inverse_root(square: Array) -> Array:
    # of the Gram matrix of X: X times it is the polar factor of X
    squares, vectors = _eigen(square)
    return (vectors * _roots(squares)[1]) @ vectors.T


def _new(rows: int, columns: int, like: Array) -> Array:
    return empty((rows, columns), np.dtype(np.float32), like)


def _float64(array: Array) -> Array:
    return array.astype(np.float64) if isinstance(array, np.ndarray) else array.double()


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()
