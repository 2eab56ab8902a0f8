"""put_entries: put numbers in the places of the entries of sparse rows, bit for bit."""

from freemerge.kernels.apply_sparse_rows import check_entries, check_rows, linear_indices
from freemerge.kernels.array import Array, SparseRows
from freemerge.kernels.checks import check_float
from freemerge.kernels.dispatch import implementation


def put_entries(array: Array, rows: SparseRows, entries: Array) -> None:
    """Write one number to the place of each entry of `rows`; nothing else is touched.

        array[i] = entries[i]    at the entries, those with value 0 too

    With what apply_sparse_rows has `kept`, the array is what it was before, signs of zeros and NaN included.

    Args:
        array: of shape `rows.shape`, any float dtype, contiguous; changed in place.
        rows: entries; their values are not looked at.
        entries: [rows.count] of the dtype of `array`.

    Raises:
        ShapeError: arrays do not fit together, or `rows` is not what it claims to be.
    """
    check_float("array", array)
    check_rows(rows, tuple(array.shape))
    check_entries("entries", entries, rows, array)
    run = implementation("put_entries", array) or put_entries_reference
    run(array, rows.offsets, rows.columns, entries)


def put_entries_reference(array: Array, offsets: Array, columns: Array, entries: Array) -> None:
    array.reshape(-1)[linear_indices(array.shape, offsets, columns)] = entries
