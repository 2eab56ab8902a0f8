import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16, task_vector
from freemerge.kernels.task_vector_statistics import task_vector_statistics, task_vector_statistics_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu


def measured(base, experts):
    result = task_vector_statistics(None if base is None else to_gpu(base), list(map(to_gpu, experts)))
    return np.stack([from_gpu(column) for column in result], axis=1)


def assert_matches_reference(base, experts):
    result, expected = measured(base, experts), task_vector_statistics_reference(base, experts)
    # another order of float64 additions: 1e-12 of what is added up, which is more than the plain sum where it cancels
    np.testing.assert_array_less(np.abs(result[:, 0] - expected[:, 0]), 1e-12 * expected[:, 1] + 1e-300)
    np.testing.assert_allclose(result[:, 1:3], expected[:, 1:3], rtol=1e-12)
    np.testing.assert_array_equal(result[:, 3], expected[:, 3])


@pytest.mark.parametrize("n", [0, 1, 15, 1024, 5003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n):
    base = random_array(n, dtype, seed=0)
    experts = [random_array(n, dtype, seed=1), base]
    assert_matches_reference(base, experts)
    assert_matches_reference(None, experts)


def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.task_vector_statistics.MOST_PROGRAMS", 4)
    base = random_array(9_001, BFLOAT16, seed=0)
    assert_matches_reference(base, [random_array(9_001, BFLOAT16, seed=t) for t in (1, 2, 3)])


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    assert_matches_reference(random_array((30, 50), base_dtype, seed=9), experts)


def test_more_experts_than_one_sweep_takes():
    assert_matches_reference(random_array(50, BFLOAT16, 0), [random_array(50, BFLOAT16, t) for t in range(1, 12)])


def test_task_vectors_of_several_shapes():
    assert_matches_reference(None, [random_array(shape, np.float32, seed=1) for shape in ((30, 40), (7,), (0,), ())])


def test_same_bits_each_time_as_a_sum_in_extended_precision_to_1e_12():
    base, expert = random_array(10_000, np.float32, seed=0), random_array(10_000, np.float32, seed=1)
    first = measured(base, [expert])
    np.testing.assert_array_equal(first, measured(base, [expert]))
    exact = task_vector(base, expert).astype(np.longdouble)
    np.testing.assert_allclose(first[0, 1], np.abs(exact).sum(), rtol=1e-12)
    np.testing.assert_allclose(first[0, 2], (exact**2).sum(), rtol=1e-12)


def test_nan_shows():
    expert = np.array([1.0, np.nan, 3.0], np.float32)
    assert np.isnan(measured(None, [expert])).all()


def test_infinity_is_the_largest():
    assert measured(None, [np.array([1.0, -np.inf], np.float32)])[0, 3] == np.inf


def test_no_experts():
    assert [len(column) for column in task_vector_statistics(to_gpu(np.zeros(3)), [])] == [0, 0, 0, 0]
