"""apply_sparse_rows: add sparse rows to an array, or put them in the place of what is there."""

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, SparseRows, dtype_of, is_tensor, rows_of, store
from freemerge.kernels.checks import check_count, check_float, check_like, check_place
from freemerge.kernels.dispatch import implementation


def apply_sparse_rows(
    array: Array,
    rows: SparseRows,
    scale: float,
    *,
    start: Array | None = None,
    out: Array,
    kept: Array | None = None,
) -> None:
    """Write `array` with the entries of `rows` added to it, or put in the place of what it holds there.

        out[i] = round( s[i] + scale * value[i] )    at the entries with value != 0
        out[i] = round( array[i] )                   elsewhere
        s[i] = array[i], or start's number for this entry (the base's weight: the entry then replaces the array's)

    Product and sum are float32, one rounding to the dtype of `out`. A float64 `array` or `start` is added
    to in float64.

    Args:
        array: of shape `rows.shape`, any float dtype, contiguous.
        rows: entries, columns ascending within a row.
        scale: no unit.
        start: [rows.count], any float dtype, parallel to `rows.values`.
        out: like `array`, any float dtype. May be `array` itself: then only the entries are touched.
        kept: [rows.count] of the dtype of `array`, filled with what it held at each entry: put_entries gives it back.

    Raises:
        ShapeError: arrays do not fit together, or `rows` is not what it claims to be.

    Source: METHODS.md sections 1.4 to 1.6.
    """
    check_like("array", array, out=out)
    check_rows(rows, tuple(array.shape))
    check_place("array", array, "rows", rows.values)
    if start is not None:
        check_float("start", start)
        check_count("start values", start, rows.count, "entries")
    if kept is not None:
        check_entries("kept", kept, rows, array)
    run = implementation("apply_sparse_rows", array) or apply_sparse_rows_reference
    run(array, rows.offsets, rows.columns, rows.values, scale, start, out, kept)


def check_entries(name: str, entries: Array, rows: SparseRows, array: Array) -> None:
    """One for each entry of `rows`, in the dtype of `array` and where that is."""
    check_float(name, entries)
    check_place("array", array, name, entries)
    check_count("numbers", entries, rows.count, "entries")
    if dtype_of(entries) != dtype_of(array):
        raise ShapeError(f"{name} is {dtype_of(entries)}, the array {dtype_of(array)}")


def check_rows(rows: SparseRows, shape: tuple[int, ...]) -> None:
    """They belong to an array of this shape, and are what they claim to be. Raises ShapeError."""
    if tuple(rows.shape) != shape:
        raise ShapeError(f"sparse rows of {list(rows.shape)} for an array of {list(shape)}")
    height, width = rows_of(shape)
    found = tuple(map(dtype_of, (rows.offsets, rows.values, rows.columns)))
    if found[:2] != (np.int64, np.float32) or found[2] not in (np.uint16, np.uint32):
        names = "{} offsets, {} values and {} columns".format(*found)
        raise ShapeError(f"sparse rows have {names}, not int64, float32 and uint16 or uint32")
    if is_tensor(rows.values):
        return  # from sparse_rows, or from a file checked on the host: looking here would wait for the GPU
    ends = (int(rows.offsets[0]), int(rows.offsets[-1])) if len(rows.offsets) == height + 1 else None
    if ends != (0, rows.count) or len(rows.columns) != rows.count or np.any(np.diff(rows.offsets) < 0):
        raise ShapeError(f"offsets of sparse rows do not lead through their {rows.count} entries in {height} rows")
    if rows.count and int(rows.columns.max()) >= width:
        raise ShapeError(f"column {int(rows.columns.max())} in rows {width} long")


def apply_sparse_rows_reference(
    array: Array,
    offsets: Array,
    columns: Array,
    values: Array,
    scale: float,
    start: Array | None,
    out: Array,
    kept: Array | None,
) -> None:
    index = linear_indices(array.shape, offsets, columns)
    if kept is not None:
        kept[...] = array.reshape(-1)[index]
    changed = values != 0
    begin = (array.reshape(-1)[index] if start is None else start)[changed]
    wide = np.float64 if begin.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        result = begin.astype(wide) + np.float32(scale) * values[changed]
    if out is not array:
        store(array if array.dtype == np.float64 else array.astype(np.float32), out)
    entries = np.empty(len(result), out.dtype)
    store(result, entries)
    out.reshape(-1)[index[changed]] = entries


def linear_indices(shape: tuple[int, ...], offsets: Array, columns: Array) -> Array:
    """Where each entry of sparse rows lies in an array of this shape, counted along its memory; in NumPy."""
    height, width = rows_of(shape)
    return np.repeat(np.arange(height) * width, np.diff(offsets)) + columns
