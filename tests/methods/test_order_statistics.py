"""Order statistics by counting digits: the value NumPy's partition finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from freemerge.methods import _order_statistics as order_statistics

numbers = st.floats(width=32, allow_nan=False)


def search(tensors, rank):
    found = order_statistics.smallest([rank])
    for _ in range(order_statistics.SWEEPS):
        counts = [order_statistics.count_digits(one, found.found[0], found.digits)[None] for one in tensors]
        found = order_statistics.narrowed(found, counts)
    return found.values[0]


@settings(derandomize=True, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(0, 50), elements=numbers), min_size=1, max_size=4), st.data())
def test_equals_partition(tensors, data):
    magnitudes = np.abs(np.concatenate(tensors))
    if len(magnitudes):
        rank = data.draw(st.integers(1, len(magnitudes)))
        assert search(tensors, rank) == np.partition(magnitudes, rank - 1)[rank - 1]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.5, np.inf])
def test_all_equal(value):
    tensors = [np.full((3, 4), -value, np.float32), np.full(5, value, np.float32)]
    assert {search(tensors, rank) for rank in (1, 9, 17)} == {np.float32(value)}


def test_several_vectors_at_once():
    vectors = [np.arange(10, dtype=np.float32), -np.arange(0, 100, 10, dtype=np.float32)]
    found = order_statistics.smallest([4, 7])
    for _ in range(order_statistics.SWEEPS):
        counts = zip(vectors, found.found, strict=True)
        counts = np.array([order_statistics.count_digits(v, start, found.digits) for v, start in counts])
        found = order_statistics.narrowed(found, [counts, order_statistics.no_digits(2, found.digits)])
    assert found.values == (3.0, 60.0)
