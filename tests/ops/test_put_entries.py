import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import SparseRows
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.put_entries import put_entries, put_entries_reference
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, poisoned, random_array

SHAPES = [(0,), (1,), (1009,), (0, 5), (1, 70001), (70001, 1), (300, 700), (3, 5, 7), ()]


def some_rows(shape):
    expert = np.asarray(random_array(shape, np.float32, 7))
    return sparse_rows(None, expert, last=max(min(1, expert.size), expert.size // 10))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_version_matches_reference(shape, dtype):
    array, rows = np.asarray(random_array(shape, dtype, seed=0)), some_rows(shape)
    entries, expected = random_array((rows.count,), dtype, seed=1), array.copy()
    put_entries_reference(expected, rows.offsets, rows.columns, entries)
    implementation("put_entries", array)(array, rows.offsets, rows.columns, entries)
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gives_back_what_apply_sparse_rows_took_bit_for_bit(dtype):
    array, rows = random_array((300, 700), dtype, seed=0), some_rows((300, 700))
    array[::3], array[1::3, ::2], array[:, ::7] = -0.0, np.nan, -np.nan
    before, kept = array.copy(), poisoned(rows.count, dtype)
    apply_sparse_rows(array, rows, 2.0, out=array, kept=kept)
    assert array.tobytes() != before.tobytes()
    put_entries(array, rows, kept)
    assert array.tobytes() == before.tobytes()


ROWS = SparseRows(np.array([0, 1, 2]), np.array([0, 2], np.uint16), np.array([1, 2], np.float32), (2, 3))


@pytest.mark.parametrize(
    ("entries", "rows", "message"),
    [
        (np.zeros(3, np.float32), ROWS, "3 numbers for 2 entries"),
        (np.zeros(2, np.float16), ROWS, "entries is float16, the array float32"),
        (
            np.zeros(2, np.float32),
            SparseRows(ROWS.offsets, ROWS.columns + np.uint16(1), ROWS.values, (2, 3)),
            "column 3",
        ),
        (np.zeros(2, np.float32), SparseRows(ROWS.offsets, ROWS.columns, ROWS.values, (3, 3)), r"\[3, 3\]"),
    ],
)
def test_rejects_what_does_not_fit(entries, rows, message):
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError, match=message):
        put_entries(array, rows, entries)
    assert not array.any()
