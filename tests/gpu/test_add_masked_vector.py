import numpy as np
import pytest

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_masked_vector import add_masked_vector, add_masked_vector_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(array, vector, mask, scale, out_dtype):
    expected, out = poisoned(array.shape, out_dtype), to_gpu(poisoned(array.shape, out_dtype))
    add_masked_vector_reference(array, vector, mask, scale, expected)
    add_masked_vector(to_gpu(array), to_gpu(vector), to_gpu(mask), scale, out=out)
    np.testing.assert_array_equal(from_gpu(out).view(np.uint8), expected.view(np.uint8))


def random_mask(n):
    return pack_mask(np.random.default_rng(0).random(n) < 0.4)


@pytest.mark.parametrize("n", [0, 1, 9, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_bit_for_bit(dtype, n):
    array, vector = random_array(n, dtype, seed=0), random_array(n, np.float32, seed=1)
    assert_matches_reference(array, vector, random_mask(n), 0.7, dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    for array_dtype in (np.float32, np.float64):
        array, vector = random_array((7, 31), array_dtype, seed=0), random_array((7, 31), dtype, seed=1)
        assert_matches_reference(array, vector, random_mask(217), -1.3, out_dtype)


def test_what_has_no_bit_stays_and_in_place():
    array = np.array([1, -0.0, 2, 3], np.float32)
    tensor, vector = to_gpu(array), to_gpu(np.array([10, np.nan, np.inf, 20], np.float32))
    add_masked_vector(tensor, vector, to_gpu(pack_mask(np.array([True, False, False, True]))), 0.5, out=tensor)
    assert tensor.tolist() == [6, 0, 2, 13]
    assert np.signbit(from_gpu(tensor)[1])
