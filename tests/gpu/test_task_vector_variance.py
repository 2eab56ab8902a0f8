import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.task_vector_variance import task_vector_variance, task_vector_variance_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, experts):
    expected, out = poisoned(base.shape, np.float32), to_gpu(poisoned(base.shape, np.float32))
    task_vector_variance_reference(base, experts, expected)
    task_vector_variance(to_gpu(base), list(map(to_gpu, experts)), out=out)
    np.testing.assert_array_equal(from_gpu(out).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("n", [0, 1, 127, 2051])
@pytest.mark.parametrize("count", [1, 3])
def test_matches_reference_bit_for_bit(count, n):
    base, *experts = (random_array(n, BFLOAT16, seed=t) for t in range(count + 1))
    assert_matches_reference(base, experts)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    assert_matches_reference(random_array((30, 50), base_dtype, seed=9), experts)


def test_nan_shows():
    base, out = np.zeros(3, np.float32), to_gpu(poisoned(3, np.float32))
    experts = [np.array(values, np.float32) for values in ([1, np.nan, 3], [1, 2, 5])]
    task_vector_variance(to_gpu(base), list(map(to_gpu, experts)), out=out)
    np.testing.assert_array_equal(from_gpu(out), np.array([0, np.nan, 1], np.float32))
