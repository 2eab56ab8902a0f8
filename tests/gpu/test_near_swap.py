import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.near_swap import near_swap, near_swap_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, expert, t, out_dtype):
    expected, out = poisoned(base.shape, out_dtype), to_gpu(poisoned(base.shape, out_dtype))
    near_swap_reference(base, expert, t, expected)
    near_swap(to_gpu(base), to_gpu(expert), t, out=out)
    got = from_gpu(out)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))  # what bits a NaN has is open
    numbers = ~np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(got[numbers].view(np.uint8), expected[numbers].view(np.uint8))


@pytest.mark.parametrize("n", [0, 1, 127, 2051])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_matches_reference_bit_for_bit(dtype, n):
    base, step = random_array(n, dtype, seed=0), random_array(n, np.float32, seed=1, scale=1e-3)
    assert_matches_reference(base, (base.astype(np.float32) + step).astype(dtype), 4e-4, dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    assert_matches_reference(random_array(500, dtype, seed=0), random_array(500, np.float32, seed=1), 0.3, out_dtype)


@pytest.mark.parametrize("t", [0, 1e-7, 1, -1, np.inf])
def test_equal_near_far_and_not_finite(t):
    base = np.array([0, 1, 1, 1, np.inf, np.inf, np.nan, 3e38, -0.0], np.float32)
    expert = np.array([0, 1, 1 + 2e-7, 2, np.inf, 1, 1, -3e38, 0], np.float32)
    assert_matches_reference(base, expert, t, np.float32)


def test_out_may_be_base():
    base, expert = random_array(1500, BFLOAT16, seed=0), random_array(1500, BFLOAT16, seed=1)
    expected, there = poisoned(1500, BFLOAT16), to_gpu(base)
    near_swap(base, expert, 0.5, out=expected)
    near_swap(there, to_gpu(expert), 0.5, out=there)
    np.testing.assert_array_equal(from_gpu(there), expected)
