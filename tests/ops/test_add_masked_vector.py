import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_masked_vector import add_masked_vector, add_masked_vector_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array


def random_mask(n, seed=0):
    return pack_mask(np.random.default_rng(seed).random(n) < 0.4)


@pytest.mark.parametrize("n", [0, 1, 9, 127, 1024, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    array, vector = random_array(n, dtype, seed=0), random_array(n, np.float32, seed=1)
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    add_masked_vector_reference(array, vector, random_mask(n), 0.7, expected)
    implementation("add_masked_vector", array)(array, vector, random_mask(n), 0.7, out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    array, vector = random_array((7, 211), np.float32, seed=0), random_array((7, 211), dtype, seed=1)
    expected, out = poisoned((7, 211), out_dtype), poisoned((7, 211), out_dtype)
    add_masked_vector_reference(array, vector, random_mask(1477), -1.3, expected)
    add_masked_vector(array, vector, random_mask(1477), -1.3, out=out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


def test_by_hand_and_in_place():
    array = np.array([1, -0.0, 2, 3], np.float32)
    vector = np.array([10, np.nan, np.inf, 20], np.float32)
    add_masked_vector(array, vector, pack_mask(np.array([True, False, False, True])), 0.5, out=array)
    assert array.tolist() == [6, 0, 2, 13]
    assert np.signbit(array[1])


def test_rejects_what_does_not_fit():
    array = np.zeros(9, np.float32)
    with pytest.raises(ShapeError, match=r"vector is \[8\], array is \[9\]"):
        add_masked_vector(array, array[:8].copy(), random_mask(9), 1.0, out=array)
    with pytest.raises(ShapeError, match=r"mask is uint8 \[1\]"):
        add_masked_vector(array, array, random_mask(8), 1.0, out=array)
