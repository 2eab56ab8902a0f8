import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from freemerge.errors import ShapeError
from freemerge.kernels.array import BFLOAT16, SparseRows, magnitude, task_vector
from freemerge.kernels.count_magnitudes import allot_ties, count_magnitudes
from freemerge.kernels.dispatch import implementation, set_threads, threads
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.sparse_rows import Selection, sparse_rows, sparse_rows_reference
from freemerge.testing import FLOATS, random_array

SHAPES = [(0,), (1,), (1009,), (0, 5), (5, 0), (1, 70001), (70001, 1), (300, 700), (3, 5, 7), ()]


def tied(shape, dtype, seed):
    """Few distinct values, like the task vectors of bfloat16 checkpoints."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def all_equal(shape, dtype, seed):
    return np.full(shape, seed, dtype)


def all_zero(shape, dtype, seed):
    return np.zeros(shape, dtype)


def mostly_zero(shape, dtype, seed):
    values = random_array(shape, np.float64, seed)
    return np.where(np.abs(values) > 2.5, values, 0).astype(dtype)


def assert_matches_reference(base, expert, first, last, scope, within=None):
    result = implementation("sparse_rows", expert)(base, expert, first, last, scope, within)
    expected = sparse_rows_reference(base, expert, first, last, scope, within)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def ranks(n):
    lasts = {0, min(1, n), n // 100, n // 2, n}
    return [(first, last) for last in sorted(lasts) for first in sorted({0, last // 3, last})]


@pytest.mark.parametrize("make", [random_array, tied, all_equal, all_zero, mostly_zero])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensor_scope_matches_reference(shape, make):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (1, 2))
    for first, last in ranks(expert.size):
        assert_matches_reference(base, expert, first, last, "tensor")


@pytest.mark.parametrize("make", [random_array, tied, all_equal, all_zero])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_scope_matches_reference(shape, make):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (1, 2))
    for first, last in ranks(shape[-1] if shape else 1):
        assert_matches_reference(base, expert, first, last, "row")


@pytest.mark.parametrize("expert_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", [None, *FLOATS], ids=str)
def test_every_mixture_of_dtypes(base_dtype, expert_dtype):
    base = None if base_dtype is None else random_array((70, 1001), base_dtype, seed=0)
    expert = random_array((70, 1001), expert_dtype, seed=1)
    assert_matches_reference(base, expert, 7, 701, "tensor")
    assert_matches_reference(base, expert, 1, 10, "row")


def test_large_tensor_where_a_sample_misleads():
    # The first sampled runs hold nothing, the largest entries lie between them.
    expert = np.zeros((1000, 512), np.float32)
    expert[:, 100:200] = random_array((1000, 100), np.float32, seed=0)
    assert_matches_reference(None, expert, 0, 50_000, "tensor")
    assert_matches_reference(None, expert, 0, 150_000, "tensor")


def test_between_thresholds_of_several_tensors():
    """Model scope: exactly the entries that ranking the concatenation gives, ties in the order of the tensors."""
    experts = [tied((40, 50), BFLOAT16, seed=0), tied((900,), BFLOAT16, seed=1), tied((3, 70_000), BFLOAT16, seed=2)]
    first, last = 1000, 80_000
    cuts = []
    for rank in (first, last):
        value, ties = (column[0] for column in magnitude_threshold([None] * 3, experts, rank))
        cuts.append((value, allot_ties([count_magnitudes(None, expert, value)[1] for expert in experts], int(ties))))
    (upper, upper_ties), (lower, lower_ties) = cuts
    kept = []
    for t, expert in enumerate(experts):
        within = Selection(lower, lower_ties[t], upper, upper_ties[t])
        assert_matches_reference(None, expert, 0, None, "tensor", within)
        kept.append(sparse_rows(None, expert, within=within).to_dense().ravel())
    everything = np.concatenate([expert.astype(np.float32).ravel() for expert in experts])
    chosen = np.argsort(-np.abs(everything), kind="stable")[first:last]
    expected = np.zeros_like(everything)
    expected[chosen] = everything[chosen]
    np.testing.assert_array_equal(np.concatenate(kept), expected)


def test_thresholds_that_leave_nothing():
    expert = random_array((30, 40), np.float32, seed=0)
    assert sparse_rows(None, expert, within=Selection(lower=2.0, lower_ties=0, upper=1.0)).count == 0


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data(), st.sampled_from(["tensor", "row"]))
def test_exactly_the_largest_with_ties_to_the_lower_index(data, scope):
    expert = data.draw(arrays(np.float32, array_shapes(max_side=20), elements=st.integers(-4, 4)))
    rows = expert.reshape(-1, expert.shape[-1]) if scope == "row" else expert.reshape(1, -1)
    last = data.draw(st.integers(0, rows.shape[1]))
    taken = sparse_rows(None, expert, last=last, scope=scope)
    ones = SparseRows(taken.offsets, taken.columns, np.ones(taken.count, np.float32), expert.shape)
    flags = ones.to_dense().reshape(rows.shape) == 1
    for row, kept in zip(np.abs(rows), flags, strict=True):
        assert kept.sum() == last
        for dropped in np.flatnonzero(~kept):
            better = (row > row[dropped]) | ((row == row[dropped]) & (np.arange(len(row)) < dropped))
            assert better.sum() >= last
    np.testing.assert_array_equal(taken.to_dense().reshape(rows.shape), np.where(flags, rows, 0))


def test_explicit_zeros_are_kept():
    taken = sparse_rows(None, np.array([0, 5, 0], np.float32), last=2)
    assert (taken.columns.tolist(), taken.values.tolist()) == ([0, 1], [0.0, 5.0])


def test_nan_is_among_the_largest():
    taken = sparse_rows(None, np.array([1, np.nan, 9], np.float32), last=1)
    assert taken.columns.tolist() == [1]
    assert np.isnan(taken.values[0])


def test_same_for_any_number_of_threads():
    base, expert = random_array((1000, 1003), BFLOAT16, seed=0), random_array((1000, 1003), BFLOAT16, seed=1)
    before = threads()
    try:
        set_threads(1)
        alone = sparse_rows(base, expert, last=10_030)
        for count in (2, 5):
            set_threads(count)
            together = sparse_rows(base, expert, last=10_030)
            np.testing.assert_array_equal(together.offsets, alone.offsets)
            np.testing.assert_array_equal(together.columns, alone.columns)
            np.testing.assert_array_equal(together.values, alone.values)
    finally:
        set_threads(before)


def test_to_dense_restores_everything():
    base, expert = random_array((30, 40), BFLOAT16, seed=0), random_array((30, 40), BFLOAT16, seed=1)
    np.testing.assert_array_equal(sparse_rows(base, expert, last=1200).to_dense(), task_vector(base, expert))


def test_kept_magnitudes_reach_the_threshold():
    base, expert = random_array((200, 400), np.float32, seed=0), random_array((200, 400), np.float32, seed=1)
    taken = sparse_rows(base, expert, last=800)
    assert np.abs(taken.values).min() == np.sort(magnitude(base, expert).ravel())[-800]


@pytest.mark.parametrize(("first", "last"), [(0, 7), (3, 2), (-1, 2), (0, None)])
def test_rejects_ranks_out_of_range(first, last):
    with pytest.raises(ShapeError, match="of a tensor of 6 elements"):
        sparse_rows(None, np.zeros((2, 3)), first=first, last=last)


def test_rejects_ranks_beside_thresholds():
    with pytest.raises(ShapeError, match="not both"):
        sparse_rows(None, np.zeros(3), last=1, within=Selection(1.0, 0))


def test_rejects_a_negative_threshold():
    with pytest.raises(ShapeError, match=r"-1\.0 is not a magnitude"):
        sparse_rows(None, np.zeros(3), within=Selection(-1.0, 0))
