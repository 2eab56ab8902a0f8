"""The linear algebra of the SVD methods on torch tensors: what NumPy gives."""

import numpy as np
import pytest

from freemerge.methods import _linear_algebra as linear_algebra
from freemerge.testing import from_gpu, random_array, to_gpu

SHAPES = [(24, 24), (20, 37), (37, 20), (1, 9)]


def close(tensor, array):
    # float64 within on either side, rounded to float32
    np.testing.assert_allclose(from_gpu(tensor.contiguous()), array, rtol=0, atol=2e-6 * np.abs(array).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_make_isotropic(shape):
    array = random_array(shape, np.float32, 0)
    tensor = to_gpu(array)
    linear_algebra.make_isotropic(tensor)
    linear_algebra.make_isotropic(array)
    close(tensor, array)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalized_triplets(monkeypatch, shape):
    monkeypatch.setattr(linear_algebra, "PIECE", 100)
    arrays = [random_array(shape, np.float32, seed) for seed in range(2)]

    def orthogonal_sum(matrices):
        parts = linear_algebra.stacked([linear_algebra.triplets(matrix, 1 + shape[0] // 3) for matrix in matrices])
        return linear_algebra.orthogonalized(parts, parts.values)

    close(orthogonal_sum([to_gpu(array) for array in arrays]), orthogonal_sum(arrays))


def test_remove_columns_in():
    matrix, basis = random_array((20, 30), np.float32, 0), np.linalg.qr(random_array((20, 6), np.float32, 1))[0]
    tensor = to_gpu(matrix)
    linear_algebra.remove_columns_in(tensor, to_gpu(basis))
    close(tensor, matrix - basis @ (basis.T @ matrix))


def test_nan_stays_and_zero_gives_zero():
    for value in (0.0, np.nan):
        tensor = to_gpu(np.full((4, 6), value, np.float32))
        linear_algebra.make_isotropic(tensor)
        np.testing.assert_array_equal(from_gpu(tensor), np.full((4, 6), value))
