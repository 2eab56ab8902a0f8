import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation, set_threads, threads
from freemerge.kernels.task_vector_statistics import CHUNK, task_vector_statistics, task_vector_statistics_reference
from freemerge.testing import FLOATS, random_array


@pytest.mark.parametrize("n", [0, 1, 15, 17, 1009, CHUNK, CHUNK + 1, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    base = random_array(n, dtype, seed=0)
    experts = [random_array(n, dtype, seed=1), base]
    for start in (base, None):
        # Both add in 16 lanes for each chunk, in the same order.
        result = implementation("task_vector_statistics", base)(start, experts)
        np.testing.assert_array_equal(result, task_vector_statistics_reference(start, experts))


@pytest.mark.parametrize("expert_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, expert_dtype):
    base, expert = random_array((30, 50), base_dtype, seed=0), random_array((30, 50), expert_dtype, seed=1)
    result = np.stack(task_vector_statistics(base, [expert]), axis=1)
    np.testing.assert_array_equal(result, task_vector_statistics_reference(base, [expert]))


def test_against_sums_in_extended_precision():
    base, expert = random_array(300_000, np.float32, seed=0), random_array(300_000, np.float32, seed=1)
    task_vector = (expert - base).astype(np.longdouble)
    result = task_vector_statistics(base, [expert])
    # 3e5 roundings at most, of 1.1e-16 of a partial sum each; the plain sum cancels: it is held to the sum of |.|
    np.testing.assert_allclose(result.sum[0], task_vector.sum(), rtol=0, atol=1e-13 * np.abs(task_vector).sum())
    np.testing.assert_allclose(result.sum_abs[0], np.abs(task_vector).sum(), rtol=1e-13)
    np.testing.assert_allclose(result.sum_squares[0], (task_vector**2).sum(), rtol=1e-13)
    assert result.max_abs[0] == np.abs(task_vector).max()


def test_same_bits_for_any_number_of_threads():
    base, expert = random_array(1_000_003, np.float32, seed=0), random_array(1_000_003, np.float32, seed=1)
    before = threads()
    try:
        results = []
        for count in (1, 2, 5):
            set_threads(count)
            results.append(np.stack(task_vector_statistics(base, [expert])))
    finally:
        set_threads(before)
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_nan_shows():
    expert = np.array([1.0, np.nan, 3.0], np.float32)
    assert np.isnan(np.stack(task_vector_statistics(None, [expert]))).all()


def test_no_experts():
    assert [len(column) for column in task_vector_statistics(np.zeros(3), [])] == [0, 0, 0, 0]


def test_rejects_an_expert_of_another_shape():
    with pytest.raises(ShapeError, match=r"experts\[0\] is \[4\], base is \[3\]"):
        task_vector_statistics(np.zeros(3), [np.zeros(4)])
