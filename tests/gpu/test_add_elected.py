import numpy as np
import pytest

from freemerge.kernels.add_elected import add_elected, add_elected_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, task_vectors, weights, scaling, normalize, out_dtype):
    expected, out = poisoned(base.shape, out_dtype), to_gpu(poisoned(base.shape, out_dtype))
    add_elected_reference(base, task_vectors, weights, scaling, normalize, expected)
    tensors = list(map(to_gpu, task_vectors))
    add_elected(to_gpu(base), tensors, weights, scaling=scaling, normalize=normalize, out=out)
    np.testing.assert_array_equal(from_gpu(out).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 9_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_bit_for_bit(dtype, n, normalize):
    task_vectors = [random_array(n, dtype, seed=t) for t in (1, 2, 3)]
    assert_matches_reference(random_array(n, dtype, seed=0), task_vectors, [0.8, 0.5, -0.3], 1.1, normalize, dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, out_dtype):
    task_vectors = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    weights = [0.5, 1.0, 0.25, 0.3, 0.7, -0.2]
    assert_matches_reference(random_array((30, 50), base_dtype, seed=9), task_vectors, weights, 0.7, True, out_dtype)


def test_zeros_ties_and_nan():
    columns = [[3, 1, 0, -1, np.nan, np.nan, -0.0], [-1, -2, 0, 1, -2, 2, 0], [2, -2, 0, 0, 1, 1, -0.0]]
    task_vectors = [np.array(column, np.float32) for column in columns]
    for normalize in (False, True):
        assert_matches_reference(np.ones(7, np.float32), task_vectors, [1, 1, 1], 1.0, normalize, np.float32)


def test_weights_that_cancel_are_not_divided_by():
    task_vectors = [np.full(5, v, np.float32) for v in (1.0, -1.0)]
    assert_matches_reference(np.zeros(5, np.float32), task_vectors, [0.5, -0.5], 1.0, True, np.float32)


def test_no_task_vectors():
    assert_matches_reference(random_array(50, BFLOAT16, seed=0), [], [], 1.0, True, np.float32)


def test_out_may_be_base():
    base, vector = random_array(5000, BFLOAT16, seed=0), random_array(5000, np.float32, seed=1)
    expected, tensor = poisoned(5000, BFLOAT16), to_gpu(base)
    add_elected_reference(base, [vector], [0.4], 1.0, False, expected)
    add_elected(tensor, [to_gpu(vector)], [0.4], scaling=1.0, normalize=False, out=tensor)
    np.testing.assert_array_equal(from_gpu(tensor), expected)
