import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.errors import ShapeError
from freemerge.kernels.array import BFLOAT16, magnitude
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.magnitude_threshold import magnitude_threshold, magnitude_threshold_reference
from freemerge.testing import FLOATS, random_array


def tied(shape, dtype, seed):
    """Few distinct values, like the task vectors of bfloat16 checkpoints."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def assert_matches_reference(bases, experts, rank, scope="model"):
    result = implementation("magnitude_threshold", experts[0] if experts else None)(bases, experts, rank, scope)
    expected = magnitude_threshold_reference(bases, experts, rank, scope)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.parametrize("n", [1, 2, 1009, 65537, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", [random_array, tied])
def test_compiled_version_matches_reference(make, dtype, n):
    base, expert = make(n, dtype, seed=0), make(n, dtype, seed=1)
    for rank in {0, 1, n // 100, n // 2, n - 1, n}:
        assert_matches_reference([base], [expert], rank)


LARGE = 300_001  # from about here on, a sample says where to look


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("make", [random_array, tied])
def test_large_tensors(make, dtype):
    base, expert = make(LARGE, dtype, seed=0), make(LARGE, dtype, seed=1)
    for rank in (1, 2, 100, LARGE // 5, LARGE // 2, LARGE - 1, LARGE):
        assert_matches_reference([base], [expert], rank)


@pytest.mark.parametrize("sampled", [0.5, 100])
def test_a_misleading_sample(sampled):
    expert = random_array(LARGE, np.float32, seed=0)
    step = LARGE // 256
    for start in range(0, step * 256, step):
        expert[start : start + 128] = sampled
    for rank in (1, 100, LARGE // 5, LARGE // 2, LARGE - 1, LARGE):
        assert_matches_reference([None], [expert], rank)


def test_large_tensors_that_are_ranked_together():
    shapes = [(LARGE,), (0,), (70_001,), (), (500, 600)]
    experts = [np.asarray(random_array(shape, BFLOAT16, seed=i)) for i, shape in enumerate(shapes)]
    for rank in (1, LARGE // 3, LARGE, LARGE + 370_002):
        assert_matches_reference([None] * 5, experts, rank)


@pytest.mark.parametrize("shape", [(1, 1009), (1009, 1), (30, 2000), (0, 5), (5, 0), (3, 4, 7), (), (2, 70001)])
@pytest.mark.parametrize("make", [random_array, tied])
def test_rows(make, shape):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (0, 1))
    width = shape[-1] if shape else 1
    for rank in {0, min(1, width), width // 3, width}:
        assert_matches_reference([base], [expert], rank, "row")


def test_several_tensors_are_ranked_together():
    shapes = [(100, 70), (0,), (70_001,), ()]
    experts = [np.asarray(random_array(shape, np.float32, seed=i)) for i, shape in enumerate(shapes)]
    everything = np.sort(np.concatenate([np.abs(expert).ravel() for expert in experts]))[::-1]
    for rank in (1, 770, 77_002):
        values, ties = magnitude_threshold([None] * 4, experts, rank)
        assert (values[0], ties[0]) == (everything[rank - 1], 1)


def test_all_equal():
    expert = np.full(100_000, -2.5, BFLOAT16)
    values, ties = magnitude_threshold([None], [expert], 1234)
    assert (values[0], ties[0]) == (2.5, 1234)


def test_nan_counts_as_infinite():
    expert = np.array([np.nan, 1, -np.inf, np.nan, 2], np.float32)
    assert magnitude_threshold([None], [expert], 3) == (np.float32(np.inf), 3)
    assert magnitude_threshold([None], [expert], 4) == (np.float32(2), 1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.floats(width=32), min_size=1, max_size=300), st.data())
def test_greater_and_ties_make_up_the_rank(numbers, data):
    expert = np.array(numbers, np.float32)
    rank = data.draw(st.integers(1, len(numbers)))
    values, ties = magnitude_threshold([None], [expert], rank)
    magnitudes = magnitude(None, expert)
    assert np.sum(magnitudes > values[0]) + ties[0] == rank
    assert 1 <= ties[0] <= np.sum(magnitudes == values[0])


def test_rejects_a_rank_out_of_range():
    with pytest.raises(ShapeError, match="rank 7, but all arrays has 6 elements"):
        magnitude_threshold([None, None], [np.zeros(4), np.zeros(2)], 7)
    with pytest.raises(ShapeError, match="rank 3, but a row has 2 elements"):
        magnitude_threshold([None], [np.zeros((4, 2))], 3, scope="row")


def test_rejects_several_tensors_in_row_scope():
    with pytest.raises(ShapeError, match="2 arrays for 1 row scope"):
        magnitude_threshold([None, None], [np.zeros(4), np.zeros(2)], 1, scope="row")
