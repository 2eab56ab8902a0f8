import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows, apply_sparse_rows_reference
from freemerge.kernels.array import BFLOAT16, SparseRows
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, poisoned, random_array

SHAPES = [(0,), (1,), (1009,), (0, 5), (5, 0), (1, 70001), (70001, 1), (300, 700), (3, 5, 7), ()]


def some_rows(shape, seed=7, share=0.1):
    expert = np.asarray(random_array(shape, np.float32, seed))
    rows = sparse_rows(None, expert, last=max(min(1, expert.size), int(expert.size * share)))
    rows.values[::5] = 0.0
    return rows


def assert_matches_reference(array, rows, scale, start, out_dtype):
    expected, out = poisoned(array.shape, out_dtype), poisoned(array.shape, out_dtype)
    kept = poisoned(rows.count, array.dtype)
    entries = (rows.offsets, rows.columns, rows.values)
    apply_sparse_rows_reference(array, *entries, scale, start, expected, None)
    implementation("apply_sparse_rows", array)(array, *entries, scale, start, out, kept)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(kept.view(np.uint8), rows.gather(array).view(np.uint8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_version_matches_reference(shape, dtype):
    array, rows = np.asarray(random_array(shape, dtype, seed=0)), some_rows(shape)
    assert_matches_reference(array, rows, -1.7, None, dtype)
    assert_matches_reference(array, rows, -1.7, random_array(rows.count, dtype, seed=1), dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("start_dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, start_dtype, out_dtype):
    array, rows = random_array((40, 50), dtype, seed=0), some_rows((40, 50))
    start = None if start_dtype is None else random_array(rows.count, start_dtype, seed=1)
    assert_matches_reference(array, rows, 0.3, start, out_dtype)


@pytest.mark.parametrize("replace", [False, True])
def test_in_place_touches_only_entries_that_are_not_zero(replace):
    array, rows = random_array((300, 700), BFLOAT16, seed=0), some_rows((300, 700))
    start = random_array(rows.count, BFLOAT16, seed=1) if replace else None
    expected, before = poisoned(array.shape, BFLOAT16), array.copy()
    apply_sparse_rows(array, rows, 2.0, start=start, out=expected)
    apply_sparse_rows(array, rows, 2.0, start=start, out=array)
    np.testing.assert_array_equal(array, expected)
    untouched = rows.to_dense() == 0
    np.testing.assert_array_equal(array[untouched], before[untouched])


def test_replace_then_add_back_nothing():
    """The base's weight with value 0 is no entry: the array keeps its own."""
    array = np.array([1.0, 2.0], np.float32)
    rows = SparseRows(np.array([0, 2]), np.array([0, 1], np.uint16), np.array([0.0, 0.5], np.float32), (2,))
    apply_sparse_rows(array, rows, 2.0, start=np.array([10.0, 20.0], np.float32), out=array)
    assert array.tolist() == [1.0, 21.0]


def test_signed_zeros_survive_the_copy():
    array = np.array([-0.0, 1.0], np.float32)
    out = poisoned(2, BFLOAT16)
    nothing = SparseRows(np.zeros(2, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.float32), (2,))
    apply_sparse_rows(array, nothing, 1.0, out=out)
    assert np.signbit(out.astype(np.float32)).tolist() == [True, False]


ROWS = SparseRows(np.array([0, 1, 2]), np.array([0, 2], np.uint16), np.array([1, 2], np.float32), (2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": (3, 2)}, r"sparse rows of \[3, 2\] for an array of \[2, 3\]"),
        ({"offsets": np.array([0, 3, 2])}, "offsets"),
        ({"offsets": np.array([0, 2])}, "offsets"),
        ({"offsets": np.array([0, 1, 3])}, "offsets"),
        ({"columns": np.array([0, 3], np.uint16)}, "column 3 in rows 3 long"),
        ({"columns": np.array([0, 3])}, "int64 columns"),
        ({"columns": np.array([0], np.uint16)}, "offsets"),
        ({"values": np.array([1.0, 2.0])}, "float64 values"),
    ],
)
def test_rejects_rows_that_are_not_what_they_claim(changed, message):
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError, match=message):
        apply_sparse_rows(array, SparseRows(**(vars(ROWS) | changed)), 1.0, out=array)


def test_rejects_a_start_of_another_length():
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError, match="3 start values for 2 entries"):
        apply_sparse_rows(array, ROWS, 1.0, start=np.zeros(3, np.float32), out=array)


@pytest.mark.parametrize(
    ("kept", "message"),
    [(np.zeros(3, np.float32), "3 numbers for 2 entries"), (np.zeros(2, np.float64), "kept is float64")],
)
def test_rejects_a_place_to_keep_entries_that_does_not_fit(kept, message):
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError, match=message):
        apply_sparse_rows(array, ROWS, 1.0, out=array, kept=kept)
