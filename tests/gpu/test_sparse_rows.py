import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.count_magnitudes import allot_ties, count_magnitudes
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.sparse_rows import Selection, sparse_rows, sparse_rows_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

ON_A_GPU = torch.cuda.is_available()
SHAPES = [(1,), (0, 5), (5, 0), (30, 3), (3, 5, 7), (), (700, 1900) if ON_A_GPU else (3, 700)]


@pytest.fixture(autouse=not ON_A_GPU, scope="module")
def _short_segments():
    """Several segments in the few elements the interpreter gets through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freemerge.kernels.triton.sparse_rows.SEGMENT", 1024)
        patch.setattr("freemerge.kernels.triton.sparse_rows.BLOCK", 256)
        patch.setattr("freemerge.kernels.triton.sparse_rows.SEGMENTS_AT_ONCE", 2)
        yield


def tied(shape, dtype, seed):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def assert_matches_reference(base, expert, first, last, scope="tensor", within=None):
    tensors = None if base is None else to_gpu(base), to_gpu(expert)
    result = sparse_rows(*tensors, first=first, last=last, scope=scope, within=within)
    expected = sparse_rows_reference(base, expert, first, last, scope, within)
    for got, want in zip((result.offsets, result.columns, result.values), expected, strict=True):
        np.testing.assert_array_equal(from_gpu(got), want)
        assert from_gpu(got).dtype == want.dtype
    assert result.shape == expert.shape


def ranks(n):
    return sorted({(0, 0), (0, n // 10), (n // 3, n)})


@pytest.mark.parametrize("make", [random_array, tied])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensor_scope_matches_reference(shape, make):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (1, 2))
    for first, last in ranks(expert.size):
        assert_matches_reference(base, expert, first, last)


@pytest.mark.parametrize("make", [random_array, tied])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_scope_matches_reference(shape, make):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (1, 2))
    for first, last in ranks(shape[-1] if shape else 1):
        assert_matches_reference(base, expert, first, last, "row")


@pytest.mark.parametrize("expert_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", [None, np.float64], ids=str)
def test_mixtures_of_dtypes(base_dtype, expert_dtype):
    base = None if base_dtype is None else random_array((10, 50), base_dtype, seed=0)
    assert_matches_reference(base, random_array((10, 50), expert_dtype, seed=1), 0, 51)


def test_long_rows_have_columns_of_32_bits(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.sparse_rows.SEGMENT", 65_536)
    monkeypatch.setattr("freemerge.kernels.triton.sparse_rows.BLOCK", 16_384)
    expert = np.zeros((2, 65_537), np.float32)
    expert[1, [0, 3, 65_536]] = 1.0, -2.0, 3.0
    assert_matches_reference(None, expert, 0, None, within=Selection(0.5, 0))  # compares dtypes, too


def test_between_thresholds_of_several_tensors():
    """Model scope: exactly the entries that ranking the concatenation gives, ties in the order of the tensors."""
    experts = [tied(shape, BFLOAT16, seed) for seed, shape in enumerate([(20, 50), (300,), (2, 400)])]
    tensors = list(map(to_gpu, experts))
    first, last = 500, 1500
    cuts = []
    for rank in (first, last):
        value, ties = (column.item() for column in magnitude_threshold([None] * 3, tensors, rank))
        cuts.append((value, allot_ties([count_magnitudes(None, tensor, value)[1] for tensor in tensors], ties)))
    (upper, upper_ties), (lower, lower_ties) = cuts
    kept = []
    for t, tensor in enumerate(tensors):
        within = Selection(lower, lower_ties[t], upper, upper_ties[t])
        kept.append(sparse_rows(None, tensor, within=within).to_dense().ravel())
    everything = np.concatenate([expert.astype(np.float32).ravel() for expert in experts])
    chosen = np.argsort(-np.abs(everything), kind="stable")[first:last]
    expected = np.zeros_like(everything)
    expected[chosen] = everything[chosen]
    np.testing.assert_array_equal(np.concatenate(kept), expected)


def test_thresholds_that_leave_nothing():
    expert = random_array((30, 40), np.float32, seed=0)
    assert_matches_reference(None, expert, 0, None, within=Selection(lower=2.0, lower_ties=0, upper=1.0))


def test_nan_and_infinity_are_the_largest():
    expert = np.array([[1, np.nan, 9], [-np.inf, 2, np.nan]], np.float32)
    for last in (2, 3, 5):
        assert_matches_reference(None, expert, 0, last)


def test_a_view_at_an_odd_offset():
    expert = random_array(2001, BFLOAT16, seed=0)
    taken, expected = sparse_rows(None, to_gpu(expert)[1:], last=20), sparse_rows(None, expert[1:], last=20)
    np.testing.assert_array_equal(taken.to_dense(), expected.to_dense())


@settings(deadline=None, derandomize=True, max_examples=100 if ON_A_GPU else 12)
@given(st.data(), st.sampled_from(["tensor", "row"]))
def test_ties_go_to_the_lower_index(data, scope):
    expert = data.draw(arrays(np.float32, array_shapes(max_side=12), elements=st.integers(-3, 3)))
    last = data.draw(st.integers(0, expert.shape[-1] if scope == "row" else expert.size))
    assert_matches_reference(None, expert, data.draw(st.integers(0, last)), last, scope)
