import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.all_finite import all_finite, all_finite_reference
from freemerge.kernels.array import FLOAT8_E4M3FN
from freemerge.testing import FLOATS, random_array


@pytest.mark.parametrize("n", [0, 1, 1023, 70_001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_finite_arrays_pass(dtype, n):
    assert all_finite(random_array(n, dtype, seed=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1024, 65_536, 70_000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_bad_element_anywhere_is_found(dtype, position, value):
    array = random_array(70_001, dtype, seed=0)
    array[position] = np.nan if dtype == FLOAT8_E4M3FN else value  # e4m3fn has no infinity
    assert not all_finite(array)
    assert not all_finite_reference(array)


def test_a_double_too_large_for_a_float_is_finite():
    assert all_finite(np.array([1e300]))


def test_rejects_integers():
    with pytest.raises(ShapeError, match="int32"):
        all_finite(np.zeros(3, np.int32))
