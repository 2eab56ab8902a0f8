"""Order statistics by counting digits: the value NumPy's partition finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from freemerge.methods import _order_statistics as order_statistics

numbers = st.floats(width=32, allow_nan=False)


def search(tensors, rank, magnitudes=True):
    found = order_statistics.smallest([rank])
    for _ in range(order_statistics.SWEEPS):
        counts = [order_statistics.count_digits(None, [one], found, magnitudes=magnitudes) for one in tensors]
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


@settings(derandomize=True, deadline=None)
@given(arrays(np.float32, st.integers(1, 50), elements=numbers), st.data())
def test_of_signed_entries(values, data):
    rank = data.draw(st.integers(1, len(values)))
    assert search([values], rank, magnitudes=False) == np.partition(values, rank - 1)[rank - 1]


def test_several_of_several_vectors_at_once():
    vectors = [np.arange(10, dtype=np.float32), -np.arange(0, 100, 10, dtype=np.float32)]
    found = order_statistics.smallest([4, 7, 1, 10])
    for _ in range(order_statistics.SWEEPS):
        counts = order_statistics.count_digits(None, vectors, found)
        found = order_statistics.narrowed(found, [counts, order_statistics.no_digits(2, found)])
    assert found.values == (3.0, 60.0, 0.0, 90.0)


def test_the_first_digits_are_counted_before_it_is_known_what_is_looked_for():
    vectors = [np.arange(10, dtype=np.float32), np.ones(10, np.float32)]
    np.testing.assert_array_equal(
        order_statistics.count_digits(None, vectors),
        order_statistics.count_digits(None, vectors, order_statistics.smallest([1, 2, 3, 4]))[:2],
    )
