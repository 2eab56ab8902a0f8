"""Rows of embeddings in another order: equal to the same rows picked one by one in NumPy, whatever run is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from freemerge.checkpoint import rows
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.rows import AVERAGE, MEAN, ZERO, Rows, RowsView
from freemerge.kernels.array import BFLOAT16, store
from freemerge.testing import random_array

WIDTH = 3


class Opened(MemoryCheckpoint):
    """Arrays in a checkpoint's place."""

    def __init__(self, tensors, label="a"):
        super().__init__(tensors, label)
        self.path, self.files, self.labels = None, (), (label,)

    def release(self, name, begin=0, end=None):
        pass


def rounded(values, dtype):
    store(np.asarray(values, np.float64), out := np.empty(np.shape(values), dtype))
    return out


def expected_rows(sources, owner, row, averages, dtype):
    found = []
    for i, k in enumerate(owner):
        if k >= 0:
            found.append(sources[k][row[i]].astype(np.float64))
        elif k == AVERAGE:
            found.append(np.mean([sources[j][n].astype(np.float64) for j, n in averages[i]], 0))
        else:
            found.append(np.zeros(WIDTH))
    found = rounded(found, dtype)
    counted = found[np.asarray(owner) != MEAN].astype(np.float64)
    found[np.asarray(owner) == MEAN] = rounded(counted.mean(0) if len(counted) else np.zeros(WIDTH), dtype)
    return found


@hypothesis_settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([np.float32, BFLOAT16]))
def test_any_run_of_any_arrangement(data, dtype):
    sources = [random_array((n, WIDTH), d, seed=n) for n, d in ((5, dtype), (4, np.float32), (7, BFLOAT16))]
    owner = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, ZERO, AVERAGE, MEAN]), min_size=1, max_size=12))
    row = [data.draw(st.integers(0, len(sources[k]) - 1)) if k >= 0 else 0 for k in owner]
    averages = {i: [(0, i % 5), (2, i % 7)] for i, k in enumerate(owner) if k == AVERAGE}
    opened = [Opened({"e": array, "other": array[0]}, str(k)) for k, array in enumerate(sources)]
    places = Rows([(o, "e") for o in opened], np.asarray(owner, np.int16), np.asarray(row), averages)
    view = RowsView(opened[0], {"e": places}, {"vocab_size": len(owner)})
    expected = expected_rows(sources, owner, row, averages, dtype)
    assert view.tensors["e"].shape == expected.shape
    # the mean's float64 sum may be formed in another order: one ulp of float32
    np.testing.assert_allclose(view.read("e").astype(np.float64), expected.astype(np.float64), rtol=1.2e-7)
    begin = data.draw(st.integers(0, expected.size))
    end = data.draw(st.integers(begin, expected.size))
    found = view.read_run("e", begin, end)
    np.testing.assert_array_equal(found, view.read("e").reshape(-1)[begin:end])
    assert found.dtype == dtype
    assert view.read("other").shape == (WIDTH,)
    assert view.config == {"vocab_size": len(owner)}


def places_of(opened, owner, row):
    return Rows([(o, "e") for o in opened], np.asarray(owner, np.int16), np.asarray(row))


def test_rows_that_follow_each_other_are_not_copied():
    array = random_array((6, WIDTH), np.float32, seed=1)
    opened = Opened({"e": array})
    view = RowsView(opened, {"e": places_of([opened], [0] * 4, [2, 3, 4, 5])})
    assert np.shares_memory(view.read("e"), array)
    np.testing.assert_array_equal(view.read("e"), array[2:])
    assert view.nbytes_made("e") == 0
    moved = RowsView(opened, {"e": places_of([opened], [0] * 4, [2, 3, 5, 4])})
    assert moved.nbytes_made("e") == 4 * WIDTH * 4
    assert np.shares_memory(moved.read_run("e", 1, 2 * WIDTH), array)


def test_a_large_tensor_is_gathered_piece_by_piece(monkeypatch):
    monkeypatch.setattr(rows, "AT_ONCE", 2 * WIDTH)
    array = random_array((7, WIDTH), np.float32, seed=1)
    opened = Opened({"e": array})
    order = [6, 0, 5, 1, 4, 2, 3, 0]
    view = RowsView(opened, {"e": places_of([opened], [0] * 7 + [MEAN], order)})
    np.testing.assert_array_equal(view.read("e")[:7], array[order[:7]])
    mean = array.astype(np.float64).mean(0)
    np.testing.assert_allclose(view.read("e")[7], mean, rtol=1.2e-7)


class Computed(Opened):
    """A checkpoint that computes what it is asked for; it notes how much that was."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.asked = []

    def nbytes_made(self, name):
        return self.tensors[name].nbytes

    def read(self, name):
        raise AssertionError("all of it was asked for")

    def read_run(self, name, begin, end):
        self.asked.append((begin // WIDTH, end // WIDTH))
        return super().read(name).reshape(-1)[begin:end]


def test_of_a_computed_tensor_only_the_rows_due_are_asked_for():
    array = random_array((9, WIDTH), np.float32, seed=1)
    opened = Computed({"e": array})
    view = RowsView(opened, {"e": places_of([opened], [0] * 6, [7, 2, 3, 4, 0, 8])})
    np.testing.assert_array_equal(view.read_run("e", 0, 5 * WIDTH), array[[7, 2, 3, 4, 0]].reshape(-1))
    assert opened.asked == [(7, 8), (2, 5), (0, 1)]


@pytest.mark.parametrize("method", ["prefetch", "release"])
def test_hints_never_raise(method):
    opened = Opened({"e": np.zeros((2, WIDTH), np.float32), "x": np.zeros(2, np.float32)})
    view = RowsView(opened, {"e": places_of([opened], [0] * 9, [0] * 9)})
    for name in ("e", "x"):
        getattr(view, method)(name)
