import numpy as np
import pytest

from freemerge.kernels.count_magnitudes import count_magnitudes, count_magnitudes_reference
from freemerge.testing import FLOATS, random_array, to_gpu


def assert_matches_reference(base, expert, value):
    found = count_magnitudes(None if base is None else to_gpu(base), to_gpu(expert), value)
    assert found == count_magnitudes_reference(base, expert, value)
    assert all(type(count) is int for count in found)


def tied(shape, dtype, seed):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


@pytest.mark.parametrize("n", [0, 1, 1009, 1024, 9_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n):
    base, expert = tied(n, dtype, seed=0), tied(n, dtype, seed=1)
    for value in (0.0, 1.0):
        assert_matches_reference(base, expert, value)
    assert_matches_reference(None, expert, 6.0)


@pytest.mark.parametrize("expert_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", [np.float64, np.float16, FLOATS[4]], ids=str)
def test_every_mixture_of_dtypes(base_dtype, expert_dtype):
    base, expert = random_array((30, 50), base_dtype, seed=0), random_array((30, 50), expert_dtype, seed=1)
    assert_matches_reference(base, expert, abs(float(expert[3, 4]) - float(base[3, 4])))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, 1.0, np.inf])
def test_special_numbers(value):
    expert = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0, 3e38], np.float32)
    assert_matches_reference(None, expert, value)
