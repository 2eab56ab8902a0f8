import numpy as np
import pytest

from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import FLOAT8_E4M3FN
from freemerge.testing import FLOATS, random_array, to_gpu


@pytest.mark.parametrize("n", [0, 1, 127, 9_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_are_finite(dtype, n):
    assert all_finite(to_gpu(random_array(n, dtype, seed=0))) is True


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_that_is_not_is_found_anywhere(dtype, value):
    for position in (0, 4095, 4096, 9_002):
        array = random_array(9_003, dtype, seed=0)
        array[position] = value
        assert all_finite(to_gpu(array)) is False


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_numbers_are_finite(dtype):
    largest = 448 if dtype == FLOAT8_E4M3FN else np.nextafter(np.array(np.inf, dtype), np.array(0, dtype))
    assert all_finite(to_gpu(np.array([largest, -largest], dtype)))
