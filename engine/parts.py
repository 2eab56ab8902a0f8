"""What an expert holds of one tensor: a part of one kind, which applies itself to the tensor. Arrays alone, no files.

    rows        sparse entries, added to the tensor or put in the place of what it holds there
    mask        one bit an entry: where a vector that all experts share is added
    low_rank    a product of two narrow matrices, added
    difference  as many numbers as the tensor has, added

A part is applied with a scale: out = round( tensor + scale * part ). The product is float32, the sum too, or float64
where the tensor is; one rounding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels._masks import mask_bytes
from freemerge.kernels.add_masked_vector import add_masked_vector
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import Array, SparseRows, column_dtype, dtype_of, empty, is_float, is_tensor, rows_of
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods._linear_algebra import Triplets
from freemerge.methods._task_vectors import add_update

__all__ = ["KINDS", "Cut", "Difference", "Layout", "LowRank", "Mask", "Part", "Rows", "apply_parts"]

Arrays = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # role -> dtype and shape

# Elements of a low-rank product that are computed at once. The grid depends on the tensor's shape alone, as the last
# bit of a product can depend on how many rows are multiplied.
BLOCK = 256 << 10


@dataclass(frozen=True)
class Layout:
    """A part that is not there yet: what arrays it will have, by their roles."""

    kind: str
    shape: tuple[int, ...]
    arrays: Arrays


class Part:
    """One tensor's share of an expert. A dataclass of arrays, and `shape`, the tensor's."""

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]  # of the arrays that are its own
    shape: tuple[int, ...]

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        """The layout that these arrays of a file should have, by the first of them. Raises KeyError without it."""
        raise NotImplementedError

    @classmethod
    def of(cls, shape: tuple[int, ...], arrays: Mapping[str, Array], shared: Mapping[str, Array]) -> "Part":
        """The part made of its own arrays and of those it shares with others, both by role."""
        return cls(**arrays, shape=shape)

    @property
    def arrays(self) -> dict[str, Array]:
        return {role: array for role in self.roles if (array := getattr(self, role)) is not None}

    @property
    def layout(self) -> Layout:
        return Layout(
            self.kind, tuple(self.shape), {role: (dtype_of(a), tuple(a.shape)) for role, a in self.arrays.items()}
        )

    @property
    def parameters(self) -> int:
        """How many numbers it is made of."""
        raise NotImplementedError

    @property
    def grain(self) -> int:
        """Runs of rows begin at multiples of this."""
        return 1

    def moved(self, move: Callable[[Array], Array]) -> "Part":
        """The same with `move` called on each array."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shape"}
        return replace(self, **{name: move(array) for name, array in arrays.items() if array is not None})

    def rows(self, first: int, last: int) -> "Part":
        """Rows first ... last - 1 (slices along the last dimension) as a part of their own; `first` as `grain` says."""
        raise NotImplementedError

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        """Write `array`, of the part's shape, with the part put in; `out` may be `array`. Raises ShapeError."""
        raise NotImplementedError


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

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        apply_sparse_rows(array, self, scale, start=self.start, out=out)


@dataclass(frozen=True)
class Mask(Part):
    """Where `vector`, which all experts share, is added. Masks as in kernels/_masks.py."""

    mask: Array
    vector: Array
    shape: tuple[int, ...]

    kind = "mask"
    roles = ("mask",)

    @staticmethod
    def planned(shape: tuple[int, ...]) -> Layout:
        return Layout("mask", tuple(shape), {"mask": (np.dtype(np.uint8), (mask_bytes(math.prod(shape)),))})

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        found["mask"]
        return cls.planned(shape)

    @classmethod
    def of(cls, shape: tuple[int, ...], arrays: Mapping[str, Array], shared: Mapping[str, Array]) -> "Mask":
        return cls(arrays["mask"], shared["vector"], shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def grain(self) -> int:
        return 8  # bits of a byte

    def rows(self, first: int, last: int) -> "Mask":
        height, width = rows_of(self.shape)
        bits = self.mask[first * width // 8 : mask_bytes(last * width)]
        return Mask(bits, self.vector.reshape(height, width)[first:last], (last - first, width))

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        add_masked_vector(array, self.vector, self.mask, scale, out=out)


@dataclass(frozen=True)
class LowRank(Part):
    """left [H, r] times right [r, W], both float32; the product is float64 and rounded to float32."""

    left: Array
    right: Array
    shape: tuple[int, ...]

    kind = "low_rank"
    roles = ("left", "right")

    @staticmethod
    def planned(shape: tuple[int, ...], rank: int) -> Layout:
        height, width = rows_of(shape)
        float32 = np.dtype(np.float32)
        return Layout("low_rank", tuple(shape), {"left": (float32, (height, rank)), "right": (float32, (rank, width))})

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        return cls.planned(shape, found["left"][1][-1])

    @classmethod
    def of_triplets(cls, found: Triplets, shape: tuple[int, ...]) -> "LowRank":
        """Of singular triplets, the values multiplied into the left vectors."""
        left, right = _float32(found.left * found.values), found.right.T
        return cls(left, right.contiguous() if is_tensor(right) else np.ascontiguousarray(right), tuple(shape))

    @property
    def parameters(self) -> int:
        return math.prod(self.left.shape) + math.prod(self.right.shape)

    @property
    def grain(self) -> int:
        return max(1, BLOCK // max(1, rows_of(self.shape)[1]))

    def rows(self, first: int, last: int) -> "LowRank":
        return LowRank(self.left[first:last], self.right, (last - first, rows_of(self.shape)[1]))

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        _check_shape(self, array)
        height, width = rows_of(self.shape)
        start, target, right = array.reshape(height, width), out.reshape(height, width), _float64(self.right)
        for first in range(0, height, self.grain):
            rows = slice(first, first + self.grain)
            product = _float32(_float64(self.left[rows]) @ right)
            _add(start[rows], product, scale, out=target[rows])


@dataclass(frozen=True)
class Difference(Part):
    """A number for each entry, float32."""

    difference: Array
    shape: tuple[int, ...]

    kind = "difference"
    roles = ("difference",)

    @staticmethod
    def planned(shape: tuple[int, ...]) -> Layout:
        return Layout("difference", tuple(shape), {"difference": (np.dtype(np.float32), tuple(shape))})

    @classmethod
    def suggested(cls, shape: tuple[int, ...], found: Arrays) -> Layout:
        found["difference"]
        return cls.planned(shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> "Difference":
        height, width = rows_of(self.shape)
        return Difference(self.difference.reshape(height, width)[first:last], (last - first, width))

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        _check_shape(self, array)
        _add(array, self.difference, scale, out=out)


KINDS: Mapping[str, type[Part]] = {kind.kind: kind for kind in (Rows, Mask, LowRank, Difference)}


@dataclass(frozen=True)
class Cut:
    """What a method has cut out of one tensor.

    Args:
        parts: one for each expert, None where it holds nothing of the tensor.
        statistics: one JSON-able dict for each expert: sums from which its scale is made.
        shared: arrays that all experts share, by role.
    """

    parts: Sequence[Part | None]
    statistics: Sequence[dict]
    shared: Mapping[str, Array] = field(default_factory=dict)

    @property
    def floats(self) -> list[Array]:
        """All float arrays there are."""
        arrays = [array for part in self.parts if part is not None for array in part.arrays.values()]
        return [array for array in (*arrays, *self.shared.values()) if is_float(dtype_of(array))]

    def moved(self, move: Callable[[Array], Array]) -> "Cut":
        """The same with `move` called on each array, once on what several parts share."""
        done: dict[int, Array] = {}

        def once(array: Array) -> Array:
            if id(array) not in done:
                done[id(array)] = move(array)
            return done[id(array)]

        parts = [None if part is None else part.moved(once) for part in self.parts]
        return Cut(parts, self.statistics, {role: once(array) for role, array in self.shared.items()})


def apply_parts(array: Array, parts: Sequence[tuple[Part, float]], *, out: Array) -> None:
    """Write round( array + sum of scale * part ) for one or more (part, scale), with one rounding.

    Args:
        array: of the parts' shape, any float dtype, contiguous.
        out: like `array`, any float dtype; may be `array` itself.
    """
    (first, scale), *others = parts
    if not others:
        return first.apply(array, scale, out=out)
    wide = np.dtype(np.float64 if dtype_of(array) == np.float64 else np.float32)
    total = empty(tuple(array.shape), wide, array)
    first.apply(array, scale, out=total)
    for part, scale in others:
        part.apply(total, scale, out=total)
    return add_task_vectors(total, [], [], out=out)


def _add(array: Array, values: Array, scale: float, *, out: Array) -> None:
    if dtype_of(array) == np.float64:  # the product is float32 there too
        scaled = empty(tuple(array.shape), np.dtype(np.float32), array)
        weighted_sum([values], [scale], out=scaled)
        values, scale = scaled, 1.0
    add_update(array, values, scale, out=out)


def _check_shape(part: Part, array: Array) -> None:
    if tuple(array.shape) != tuple(part.shape):
        raise ShapeError(f"a {part.kind} part of {list(part.shape)} for an array of {list(array.shape)}")


def _float64(array: Array) -> Array:
    return array.double() if is_tensor(array) else array.astype(np.float64)


def _float32(array: Array) -> Array:
    return array.float() if is_tensor(array) else array.astype(np.float32)
