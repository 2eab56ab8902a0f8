import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.errors import ShapeError
from freemerge.kernels._masks import empty_mask, unpack_mask
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.magnitude_mask import magnitude_mask, magnitude_mask_reference
from freemerge.kernels.magnitude_threshold import Threshold, magnitude_threshold
from freemerge.testing import FLOATS, random_array


def tied(shape, dtype, seed):
    """Few distinct values, like the task vectors of bfloat16 checkpoints."""
    return np.asarray(np.random.default_rng(seed).integers(-3, 4, shape)).astype(dtype)


def assert_matches_reference(base, expert, lower, upper):
    out, expected = np.full_like(empty_mask(expert), 0xAA), empty_mask(expert)
    magnitude_mask_reference(base, expert, lower, upper, expected)
    implementation("magnitude_mask", expert)(base, expert, lower, upper, out)
    np.testing.assert_array_equal(out, expected)
    return unpack_mask(out, expert.shape)


@pytest.mark.parametrize("n", [0, 1, 2, 1009, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", [random_array, tied])
def test_a_tensor(make, dtype, n):
    base, expert = make(n, dtype, seed=0), make(n, dtype, seed=1)
    for first, last in [(0, 0), (0, n // 3), (n // 50, n // 2), (n // 3, n // 3), (0, n)]:
        lower, upper = (magnitude_threshold([base], [expert], rank) for rank in (last, first))
        kept = assert_matches_reference(base, expert, lower, upper)
        assert kept.sum() == last - first
    assert_matches_reference(None, expert, lower, None)


@pytest.mark.parametrize("shape", [(1, 1009), (1009, 1), (30, 2000), (0, 5), (5, 0), (3, 4, 7), (2, 70_001)])
@pytest.mark.parametrize("make", [random_array, tied])
def test_rows(make, shape):
    base, expert = (make(shape, BFLOAT16, seed=seed) for seed in (0, 1))
    width = shape[-1]
    for first, last in [(0, min(1, width)), (width // 20, width // 3), (0, width)]:
        lower, upper = (magnitude_threshold([base], [expert], rank, scope="row") for rank in (last, first))
        kept = assert_matches_reference(base, expert, lower, upper)
        assert (kept.sum(axis=-1) == last - first).all()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, np.inf, np.nan, 1e-40]), min_size=1, max_size=40), st.data())
def test_exactly_the_ranks_asked_for(values, data):
    expert = np.array(values, np.float32)
    last = data.draw(st.integers(0, len(values)))
    first = data.draw(st.integers(0, last))
    lower, upper = (magnitude_threshold([None], [expert], rank) for rank in (last, first))
    kept = assert_matches_reference(None, expert, lower, upper)
    magnitudes = np.where(np.isnan(expert), np.inf, np.abs(expert))
    order = np.argsort(-magnitudes, kind="stable")  # the lower index first among equals
    assert sorted(order[first:last]) == np.flatnonzero(kept).tolist()


def test_ties_of_none_and_of_all():
    expert = np.array([2, 1, 2, 3], np.float32)
    value = np.array([2], np.float32)
    kept = [
        assert_matches_reference(None, expert, Threshold(value, np.array([ties])), None).tolist() for ties in (0, 1, 9)
    ]
    assert kept == [[False, False, False, True], [True, False, False, True], [True, False, True, True]]


def test_rejects_thresholds_of_other_rows():
    expert = np.zeros((3, 4), np.float32)
    two = Threshold(np.zeros(2, np.float32), np.zeros(2, np.int64))
    with pytest.raises(ShapeError, match=r"thresholds of \[2\] values for 3 rows"):
        magnitude_mask(None, expert, two, None, out=empty_mask(expert))
