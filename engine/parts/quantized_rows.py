"""Sparse entries in 8 bits, with a scale for each row of the tensor: rows.Rows at half the size, and not quite exact.

    value = quantized * row_scale,    row_scale = max |value| of the row / largest number of the dtype

in float32, quantized to the nearest, even at ties. The scale is rounded up, so nothing is cut off: a value is at most
half a step away. In int8 a step is the row's scale; in float8_e4m3fn it is an eighth of the value's power of two, for
small values 2^-9 of the row's scale.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import FLOAT8_E4M3FN, Array, column_dtype, is_tensor, rows_of
from freemerge.parts.part import Arrays, Layout, Part
from freemerge.parts.rows import Rows

# dtype of the values -> the largest number of it that is used
LARGEST: Mapping[np.dtype, float] = MappingProxyType({np.dtype(np.int8): 127.0, FLOAT8_E4M3FN: 448.0})
INT8 = np.dtype(np.int8)

# An entry of value 0 leaves the tensor as it is, but one that replaces and became 0 puts the base's weight there.
_ALMOST_ZERO = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class QuantizedRows(Part):
    """Sparse entries as in Rows.

    Attributes:
        lengths: [rows] uint16 where rows are shorter than 65536, else uint32; how many entries each row has.
        columns: [n] as in SparseRows.
        values: [n] int8 or float8_e4m3fn.
        row_scales: [rows] float32, 0 in rows without entries.
        start: [n] as in Rows, or None.
    """

    lengths: Array
    columns: Array
    values: Array
    row_scales: Array
    shape: tuple[int, ...]
    start: Array | None = None

    kind = "quantized_rows"
    roles = ("lengths", "columns", "values", "row_scales", "start")

    @staticmethod
    def planned(shape: tuple[int, ...], count: int, dtype: np.dtype, start: np.dtype | None = None) -> Layout:
        """Of `count` entries of this dtype; `start` as for Rows."""
        height, width = rows_of(shape)
        arrays = {
            "lengths": (np.dtype(np.uint16 if width < 65536 else np.uint32), (height,)),
            "columns": (column_dtype(width), (count,)),
            "values": (np.dtype(dtype), (count,)),
            "row_scales": (np.dtype(np.float32), (height,)),
        }
        arrays |= {} if start is None else {"start": (np.dtype(start), (count,))}
        return Layout("quantized_rows", tuple(shape), arrays)

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        dtype, (count,) = found["values"]
        return cls.planned(
            shape, count, dtype if dtype in LARGEST else INT8, found["start"][0] if "start" in found else None
        )

    @classmethod
    def quantized(cls, rows: Rows, dtype: np.dtype) -> "QuantizedRows":
        """Of rows on the host, without those entries of value 0, which change nothing.

        Raises:
            ShapeError: a value is infinite or NaN.
        """
        if not np.isfinite(rows.values).all():
            raise ShapeError("values that are not finite cannot be quantized")
        planned = cls.planned(rows.shape, 0, dtype).arrays
        kept = rows.values != 0
        row = np.repeat(np.arange(len(rows.offsets) - 1), np.diff(rows.offsets))[kept]
        lengths = np.bincount(row, minlength=len(rows.offsets) - 1)
        values = rows.values[kept]
        scales = _row_scales(np.abs(values), lengths, LARGEST[np.dtype(dtype)])
        quotients = values / scales[row]
        if np.dtype(dtype) == INT8:
            quotients = np.rint(quotients)
        return cls(
            lengths.astype(planned["lengths"][0]),
            rows.columns[kept],
            quotients.astype(dtype),
            scales,
            tuple(rows.shape),
            None if rows.start is None else rows.start[kept],
        )

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def parameters(self) -> int:
        return self.count

    @cached_property
    def offsets(self) -> Array:
        """int64 [rows + 1], as in SparseRows."""
        if is_tensor(self.lengths):
            return sys.modules["torch"].nn.functional.pad(self.lengths.long().cumsum(0), (1, 0))
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def rows(self, first: int, last: int) -> "QuantizedRows":
        entries = slice(int(self.offsets[first]), int(self.offsets[last]))
        return QuantizedRows(
            self.lengths[first:last],
            self.columns[entries],
            self.values[entries],
            self.row_scales[first:last],
            (last - first, rows_of(self.shape)[1]),
            None if self.start is None else self.start[entries],
        )

    def expanded(self) -> Rows:
        """The same in float32."""
        if is_tensor(self.values):
            torch = sys.modules["torch"]
            values = self.values.float() * self.row_scales.repeat_interleave(self.lengths.long())
            almost_zero = torch.where(values == 0, float(_ALMOST_ZERO), values)
        else:
            values = self.values.astype(np.float32) * np.repeat(self.row_scales, self.lengths)
            almost_zero = np.where(values == 0, _ALMOST_ZERO, values)
        return Rows(
            self.offsets, self.columns, values if self.start is None else almost_zero, tuple(self.shape), self.start
        )

    def check(self) -> None:
        if is_tensor(self.values):
            return  # of a file checked on the host: looking here would wait for the GPU
        wrong = np.flatnonzero(~((self.row_scales >= 0) & np.isfinite(self.row_scales)))
        if len(wrong):
            raise ShapeError(
                f"the scale of row {wrong[0]} is {self.row_scales[wrong[0]]}, not a finite number of 0 or more"
            )
        if self.values.dtype != INT8 and np.isnan(self.values).any():
            raise ShapeError("a value is NaN")
        if self.offsets[-1] != self.count:
            raise ShapeError(f"lengths lead to {self.offsets[-1]} entries, there are {self.count}")
        width = rows_of(self.shape)[1]
        if self.count and int(self.columns.max()) >= width:
            raise ShapeError(f"column {int(self.columns.max())} in rows {width} long")

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        self.check()
        self.expanded().apply(array, scale, out=out)


def _row_scales(magnitudes: Array, lengths: Array, largest: float) -> Array:
    """float32 [rows]: the largest magnitude of each row as a multiple of `largest`, rounded up."""
    tops = np.zeros(len(lengths), np.float32)
    filled = lengths > 0
    if filled.any():
        tops[filled] = np.maximum.reduceat(magnitudes, (np.cumsum(lengths) - lengths)[filled])
    scales = tops / np.float32(largest)
    scales = np.where(scales * np.float64(largest) < tops, np.nextafter(scales, np.float32(np.inf)), scales)
    # rounded up, the largest numbers there are would become infinite
    return np.minimum(scales, np.nextafter(np.finfo(np.float32).max / np.float32(largest), np.float32(0)))
