import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.weighted_sum import weighted_sum, weighted_sum_reference
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 4097, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    arrays = [random_array(n, dtype, seed=t) for t in range(3)]
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    weighted_sum_reference(arrays, [0.3, -0.7, 1.1], expected)
    implementation("weighted_sum", out)(arrays, [0.3, -0.7, 1.1], out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_every_mixture_of_dtypes(dtypes, out_dtype):
    arrays = [random_array(1500, dtype, seed=t) for t, dtype in enumerate(dtypes)]
    expected, out = poisoned(1500, out_dtype), poisoned(1500, out_dtype)
    weighted_sum_reference(arrays, [0.5, 0.25], expected)
    weighted_sum(arrays, [0.5, 0.25], out=out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


def test_out_may_be_one_of_the_arrays():
    arrays = [random_array(5000, np.float32, seed=t) for t in range(2)]
    expected = poisoned(5000, np.float32)
    weighted_sum_reference(arrays, [0.4, 0.6], expected)
    weighted_sum(arrays, [0.4, 0.6], out=arrays[1])
    np.testing.assert_array_equal(arrays[1], expected)


def test_no_arrays_sum_to_zero():
    out = poisoned((3, 4), np.float32)
    weighted_sum([], [], out=out)
    np.testing.assert_array_equal(out, np.zeros((3, 4)))


def test_rejects_an_array_of_another_shape():
    with pytest.raises(ShapeError, match=r"arrays\[1\] is \[4\], out is \[5\]"):
        weighted_sum([np.zeros(5), np.zeros(4)], [1, 1], out=np.zeros(5))


def test_rejects_the_wrong_number_of_weights():
    with pytest.raises(ShapeError, match="3 weights for 1 arrays"):
        weighted_sum([np.zeros(5)], [1, 2, 3], out=np.zeros(5))
