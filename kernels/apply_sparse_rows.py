"""apply_sparse_rows: add sparse rows to an array, or put them in the place of what is there."""

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, SparseRows, dtype_of, is_tensor, rows_of, store
from freemerge.kernels.checks import check_count, check_float, check_like, check_place
from freemerge.kernels.dispatch import implementation


def apply_sparse_rows(array: Array, rows: SparseRows, scale: float, *, start: Array | None = None, out: Array) -> None:
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

    Raises:
        ShapeError: arrays do not fit together, or `rows` is not what it claims to be.

    Source: METHODS.md sections 1.4 to 1.6.
    """
    check_like("array", array, out=out)
    _check_rows(rows, tuple(array.shape))
    check_place("array", array, "rows", rows.values)
    if start is not None:
        check_float("start", start)
        check_count("start values", start, rows.count, "entries")
    run = implementation("apply_sparse_rows", array) or apply_sparse_rows_reference
    run(array, rows.offsets, rows.columns, rows.values, scale, start, out)


def _check_rows(rows: SparseRows, shape: tuple[int, ...]) -> None:
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
    array: Array, offsets: Array, columns: Array, values: Array, scale: float, start: Array | None, out: Array
) -> None:
    height, width = rows_of(array.shape)
    index = np.repeat(np.arange(height) * width, np.diff(offsets)) + columns
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
