import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.weighted_sum import weighted_sum, weighted_sum_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(arrays, weights, out_dtype, shape):
    expected, out = poisoned(shape, out_dtype), to_gpu(poisoned(shape, out_dtype))
    weighted_sum_reference(arrays, weights, expected)
    weighted_sum(list(map(to_gpu, arrays)), weights, out=out)
    np.testing.assert_array_equal(from_gpu(out).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 9_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_bit_for_bit(dtype, n):
    assert_matches_reference([random_array(n, dtype, seed=t) for t in range(3)], [0.3, -0.7, 1.1], dtype, n)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_a_mixture_of_dtypes(out_dtype):
    arrays = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    assert_matches_reference(arrays, [0.5, 0.25, -1.0, 0.3, 0.2, 2.0], out_dtype, (30, 50))


def test_no_arrays_make_zero():
    assert_matches_reference([], [], BFLOAT16, (3, 5))


def test_out_may_be_one_of_the_arrays():
    arrays = [random_array(5000, BFLOAT16, seed=t) for t in range(2)]
    expected, tensors = poisoned(5000, BFLOAT16), list(map(to_gpu, arrays))
    weighted_sum_reference(arrays, [0.4, 0.6], expected)
    weighted_sum(tensors, [0.4, 0.6], out=tensors[1])
    np.testing.assert_array_equal(from_gpu(tensors[1]), expected)


def test_weights_may_be_numpy_numbers():
    arrays = [random_array(100, np.float32, seed=t) for t in range(2)]
    assert_matches_reference(arrays, np.array([0.1, 0.2]), np.float32, 100)
