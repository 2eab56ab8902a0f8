"""Order statistics by a sample and by counting: the value NumPy's partition finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from freemerge.kernels.array import BFLOAT16, numel
from freemerge.methods import _order_statistics as order_statistics

numbers = st.floats(width=32, allow_nan=False)


def search(vectors_of_tensors, ranks, magnitudes=True):
    """The order statistics of T vectors, and the number of sweeps; for each tensor a list of T arrays."""
    samples = []
    for vectors in vectors_of_tensors:
        some = [order_statistics.sampled(vector) for vector in vectors]
        samples.append(order_statistics.keyed(some, numel(vectors[0]), magnitudes=magnitudes))
    found, sweeps = order_statistics.guessed(samples, ranks, magnitudes=magnitudes), 1
    while not found.complete:
        found = order_statistics.narrowed(
            found, [order_statistics.count(None, vectors, found) for vectors in vectors_of_tensors]
        )
        sweeps += 1
    assert sweeps <= order_statistics.SWEEPS
    return found.values, sweeps


@settings(derandomize=True, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(0, 50), elements=numbers), min_size=1, max_size=4), st.data())
def test_equals_partition(tensors, data):
    magnitudes = np.abs(np.concatenate(tensors))
    if len(magnitudes):
        rank = data.draw(st.integers(1, len(magnitudes)))
        (found,), _ = search([[tensor] for tensor in tensors], [rank])
        assert found == np.partition(magnitudes, rank - 1)[rank - 1]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.5, np.inf])
def test_all_equal(value):
    tensors = [[np.full((3, 4), -value, np.float32)], [np.full(5, value, np.float32)]]
    assert {search(tensors, [rank])[0] for rank in (1, 9, 17)} == {(np.float32(value),)}


@settings(derandomize=True, deadline=None)
@given(arrays(np.float32, st.integers(1, 50), elements=numbers), st.data())
def test_of_signed_entries(values, data):
    rank = data.draw(st.integers(1, len(values)))
    (found,), _ = search([[values]], [rank], magnitudes=False)
    assert found == np.partition(values, rank - 1)[rank - 1]


def test_several_of_several_vectors_at_once():
    vectors = [np.arange(10, dtype=np.float32), -np.arange(0, 100, 10, dtype=np.float32)]
    assert search([vectors], [4, 7, 1, 10])[0] == (3.0, 60.0, 0.0, 90.0)


SHAPES = [(300, 400), (7,), (90_001,), (3, 5)]  # larger and smaller than a sample


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_a_sample_of_large_tensors_saves_sweeps(dtype):
    random = np.random.default_rng(0)
    tensors = [[random.standard_normal(shape, np.float32).astype(dtype) for _ in range(2)] for shape in SHAPES]
    everything = [np.sort(np.concatenate([abs(one[t].astype(np.float32)).ravel() for one in tensors])) for t in (0, 1)]
    n = len(everything[0])
    for rank in (n // 2, n // 5 * 4):
        found, sweeps = search(tensors, [rank, n - rank + n // 5])
        assert found == (everything[0][rank - 1], everything[1][n - rank + n // 5 - 1])
        assert sweeps <= 3
    for rank in (1, n // 100, n):
        assert search(tensors, [rank, rank])[0] == (everything[0][rank - 1], everything[1][rank - 1])


@pytest.mark.parametrize("hidden", [1e-3, 1.0, 1e3])
def test_a_misleading_sample(hidden):
    tensor = np.random.default_rng(0).standard_normal(90_001, np.float32) * np.float32(hidden)
    seen = np.random.default_rng(1).standard_normal(order_statistics.SAMPLE, np.float32)
    starts = np.linspace(0, tensor.size - order_statistics.RUN, len(seen) // order_statistics.RUN, dtype=np.int64)
    for i, start in enumerate(starts):
        tensor[start : start + order_statistics.RUN] = seen[order_statistics.RUN * i :][: order_statistics.RUN]
    for rank in (1, 1000, 45_000, 90_001):
        (found,), _ = search([[tensor]], [rank], magnitudes=False)
        assert found == np.sort(tensor)[rank - 1]


def test_tensors_that_are_left_out():
    vectors = [np.arange(10, dtype=np.float32), np.ones(10, np.float32)]
    samples = [order_statistics.keyed(vectors, 10), order_statistics.no_sample(2)]
    assert order_statistics.sizes(samples) == [10, 10]
    found = order_statistics.guessed(samples, [5, 5])
    counts = [order_statistics.count(None, vectors, found), order_statistics.no_counts(found)]
    assert order_statistics.narrowed(found, counts).values == (4.0, 1.0)
    nothing = order_statistics.guessed([order_statistics.no_sample(2)], [1, 1])
    assert nothing.complete
