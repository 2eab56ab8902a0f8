import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.magnitude_threshold import magnitude_threshold, magnitude_threshold_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

LARGE = 3_000_017 if torch.cuda.is_available() else 4_999  # more than a program's share on a GPU


def tied(shape, dtype, seed):
    """Few distinct values, like the task vectors of bfloat16 checkpoints."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def assert_matches_reference(bases, experts, rank, scope="model"):
    tensors = [None if base is None else to_gpu(base) for base in bases], list(map(to_gpu, experts))
    result = magnitude_threshold(*tensors, rank, scope=scope)
    for got, want in zip(result, magnitude_threshold_reference(bases, experts, rank, scope), strict=True):
        np.testing.assert_array_equal(from_gpu(got), want)
        assert from_gpu(got).dtype == want.dtype


@pytest.mark.parametrize("n", [1, 1009, LARGE])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("make", [random_array, tied])
def test_matches_reference(make, dtype, n):
    base, expert = make(n, dtype, seed=0), make(n, dtype, seed=1)
    for rank in {0, n // 100, n}:
        assert_matches_reference([base], [expert], rank)


@pytest.mark.parametrize("base_dtype", [None, *FLOATS], ids=str)
def test_a_mixture_of_dtypes(base_dtype):
    experts = [random_array((20, 30), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    bases = [None if base_dtype is None else random_array((20, 30), base_dtype, seed=9 + t) for t in range(6)]
    assert_matches_reference(bases, experts, 777)


@pytest.mark.parametrize("shape", [(1, 1009), (109, 1), (30, 200), (0, 5), (5, 0), (3, 4, 7), (), (130, 16)])
@pytest.mark.parametrize("make", [random_array, tied])
def test_rows(make, shape):
    base, expert = (np.asarray(make(shape, BFLOAT16, seed=seed)) for seed in (0, 1))
    width = shape[-1] if shape else 1
    for rank in {0, width // 3, width}:
        assert_matches_reference([base], [expert], rank, "row")


def test_rows_longer_than_registers(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.magnitude_threshold.MOST_COLUMNS", 64)
    for make in (random_array, tied):
        base, expert = (make((3, 2500), BFLOAT16, seed=seed) for seed in (0, 1))
        for rank in (25, 2500):
            assert_matches_reference([base], [expert], rank, "row")


def test_tensors_are_ranked_together():
    experts = [
        np.asarray(random_array(shape, np.float32, seed=i)) for i, shape in enumerate([(9, 70), (0,), (LARGE,), ()])
    ]
    for rank in (1, 770, LARGE + 631):
        assert_matches_reference([None] * 4, experts, rank)


def test_all_equal():
    assert_matches_reference([None], [np.full(LARGE, -2.5, BFLOAT16)], 1234)
    assert_matches_reference([None], [np.zeros(LARGE, BFLOAT16)], 1)


def test_a_view_at_an_odd_offset():
    expert = to_gpu(random_array(1001, BFLOAT16, seed=0))
    values, ties = magnitude_threshold([None], [expert[1:]], 10)
    expected = magnitude_threshold_reference([None], [from_gpu(expert)[1:]], 10, "model")
    assert (values.tolist(), ties.tolist()) == (expected[0].tolist(), expected[1].tolist())


@pytest.mark.parametrize("rank", [0, 1, 4, 5, 8, 10])
def test_special_numbers(rank):
    expert = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0, 3e38], np.float32)
    assert_matches_reference([None], [expert], rank)
    assert_matches_reference([None], [np.stack([expert, expert[::-1]])], rank, "row")


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.lists(st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=60), st.data())
def test_any_numbers(numbers, data):
    rank = data.draw(st.integers(0, len(numbers)))
    assert_matches_reference([None], [np.array(numbers, np.float32)], rank)
    assert_matches_reference([None], [np.array([numbers, numbers[::-1]], np.float32)], rank, "row")
