"""What an array is: a NumPy array on the CPU, a torch tensor on a GPU; float dtypes, and conversions ops share."""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = Any  # np.ndarray or torch.Tensor; torch is imported by whoever makes a tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)
FLOATS = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2)
_FLOATS = frozenset(FLOATS)


def is_float(dtype: np.dtype) -> bool:
    return np.dtype(dtype) in _FLOATS


def is_tensor(array: Array) -> bool:
    """Whether it is a torch tensor; else it is a NumPy array."""
    return not isinstance(array, np.ndarray)


def dtype_of(array: Array) -> np.dtype:
    """Its dtype as NumPy knows it."""
    return array.dtype if isinstance(array, np.ndarray) else _numpy_dtype(array.dtype)


@lru_cache
def _numpy_dtype(torch_dtype) -> np.dtype:
    name = str(torch_dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))


def torch_dtype(dtype: np.dtype):
    """The torch dtype of the same name."""
    return getattr(sys.modules["torch"], np.dtype(dtype).name)


def numel(array: Array) -> int:
    return array.size if isinstance(array, np.ndarray) else array.numel()


def empty(shape: tuple[int, ...], dtype: np.dtype, like: Array) -> Array:
    """A new array, not filled, of the kind and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    return sys.modules["torch"].empty(shape, dtype=torch_dtype(dtype), device=like.device)


def task_vector(base: Array | None, expert: Array) -> Array:
    """Expert minus base as float32; formed in float64 first where either is float64. Without base: the expert."""
    if is_tensor(expert):
        return _tensor_task_vector(base, expert)
    if base is None:
        with np.errstate(over="ignore"):
            return expert.astype(np.float32)
    wide = np.float64 if np.float64 in (base.dtype, expert.dtype) else np.float32
    return np.asarray(expert.astype(wide) - base.astype(wide), np.float32)  # 0-d too, where NumPy answers a number


def _tensor_task_vector(base: Array | None, expert: Array) -> Array:
    torch = sys.modules["torch"]
    if base is None:
        return expert.to(torch.float32)
    wide = torch.float64 if torch.float64 in (base.dtype, expert.dtype) else torch.float32
    return (expert.to(wide) - base.to(wide)).to(torch.float32)


def magnitude(base: Array | None, expert: Array) -> Array:
    """The absolute task vector as float32. NaN counts as infinite, so that it is found among the largest."""
    values = np.abs(task_vector(base, expert))
    return np.where(np.isnan(values), np.float32(np.inf), values)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows an array of this shape has, and how long they are (slices along the last dimension; 0-d: 1 x 1)."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def column_dtype(width: int) -> np.dtype:
    """The narrowest dtype for the columns of rows this long: uint16 or uint32."""
    return np.dtype(np.uint16 if width <= 65536 else np.uint32)


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows: some entries of an array, row after row, columns ascending within a row.

    Attributes:
        offsets: int64 [rows + 1]; the entries of row r are offsets[r] ... offsets[r + 1] - 1.
        columns: uint16 [n] where rows are at most 65536 long, else uint32.
        values: float32 [n]; explicit zeros are allowed.
        shape: of the array the entries belong to; rows are slices along its last dimension.

    The three arrays are of one kind: NumPy arrays, or torch tensors on one device.
    """

    offsets: Array
    columns: Array
    values: Array
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def sum_abs(self) -> float:
        """The sum of the magnitudes of all entries, added in float64."""
        if is_tensor(self.values):
            return float(self.values.abs().sum(dtype=sys.modules["torch"].float64))
        return float(np.abs(self.values).sum(dtype=np.float64))

    def gather(self, array: Array) -> Array:
        """[n]: what `array`, of `shape` and of the same kind, holds at each entry."""
        rows, width = rows_of(self.shape)
        if is_tensor(array):
            torch = sys.modules["torch"]
            row = torch.repeat_interleave(torch.arange(rows, device=array.device), self.offsets.diff())
            return array.reshape(-1)[row * width + self.columns.to(torch.int64)]
        return array.reshape(-1)[np.repeat(np.arange(rows), np.diff(self.offsets)) * width + self.columns]

    def on_host(self) -> "SparseRows":
        """The same in NumPy arrays."""
        if not is_tensor(self.values):
            return self
        return SparseRows(*(a.cpu().numpy() for a in (self.offsets, self.columns, self.values)), self.shape)

    def to_dense(self) -> Array:
        """The array of `shape`, float32, zero wherever there is no entry; in NumPy."""
        if is_tensor(self.values):
            return self.on_host().to_dense()
        rows, width = rows_of(self.shape)
        dense = np.zeros((rows, width), np.float32)
        dense[np.repeat(np.arange(rows), np.diff(self.offsets)), self.columns] = self.values
        return dense.reshape(self.shape)


def store(values: Array, out: Array) -> None:
    """Write float32 or float64 values to `out` with one rounding to nearest even."""
    if values.dtype == np.float64 and out.dtype.itemsize < 4:
        values = _to_odd(values)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.reshape(out.shape).astype(out.dtype)


def _to_odd(values: Array) -> Array:
    # float64 to float32 by "round to odd": the rounding to a narrower type that follows is then as good as the only one
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.int32)
    inexact = (nearest.astype(np.float64) != values) & ~np.isnan(values) & (bits & 1 == 0)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(inexact, np.where(away, bits - 1, bits + 1), bits).astype(np.int32).view(np.float32)
