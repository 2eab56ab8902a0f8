"""Sparse entries of a tensor, added to it or put in the place of what it holds there."""

from dataclasses import dataclass

import numpy as np

from freemerge.kernels.apply_sparse_rows import apply_sparse_rows, check_rows
from freemerge.kernels.array import Array, SparseRows, column_dtype, rows_of
from freemerge.parts.part import Arrays, Layout, Part


@dataclass(frozen=True)
class Rows(SparseRows, Part):
    """Sparse entries. With `start` [count], the base's weights there, start + scale * value replaces what was there."""

    start: Array | None = None

    kind = "rows"
    roles = ("offsets", "columns", "values", "start")

    @staticmethod
    def planned(shape: tuple[int, ...], count: int, start: np.dtype | None = None) -> Layout:
        """Of `count` entries; `start` is the dtype of the base's weights where entries replace."""
        height, width = rows_of(shape)
        arrays = {
            "offsets": (np.dtype(np.int64), (height + 1,)),
            "columns": (column_dtype(width), (count,)),
            "values": (np.dtype(np.float32), (count,)),
        }
        return Layout("rows", tuple(shape), arrays | ({} if start is None else {"start": (np.dtype(start), (count,))}))

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        (count,) = found["values"][1]
        return cls.planned(shape, count, found["start"][0] if "start" in found else None)

    @classmethod
    def cut(cls, rows: SparseRows, replacing: Array | None = None) -> "Rows":
        """Of sparse rows; `replacing` is the base's tensor where they replace."""
        start = None if replacing is None else rows.gather(replacing)
        return cls(rows.offsets, rows.columns, rows.values, rows.shape, start)

    @property
    def parameters(self) -> int:
        return self.count

    def rows(self, first: int, last: int) -> "Rows":
        offsets = self.offsets[first : last + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        start = None if self.start is None else self.start[entries]
        shape = (last - first, rows_of(self.shape)[1])
        return Rows(offsets - offsets[0], self.columns[entries], self.values[entries], shape, start)

    def check(self) -> None:
        check_rows(self, tuple(self.shape))

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        apply_sparse_rows(array, self, scale, start=self.start, out=out)
