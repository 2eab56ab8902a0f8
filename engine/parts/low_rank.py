"""A product of two narrow matrices, added."""

import math
from dataclasses import dataclass

import numpy as np

from freemerge.kernels.array import Array, is_tensor, rows_of
from freemerge.methods._linear_algebra import Triplets
from freemerge.parts.part import Arrays, Layout, Part, add_scaled, check_shape

# Elements of the product that are computed at once. The grid depends on the tensor's shape alone, as the last bit of a
# product can depend on how many rows are multiplied.
BLOCK = 256 << 10


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
        check_shape(self, array)
        height, width = rows_of(self.shape)
        start, target, right = array.reshape(height, width), out.reshape(height, width), _float64(self.right)
        for first in range(0, height, self.grain):
            rows = slice(first, first + self.grain)
            product = _float32(_float64(self.left[rows]) @ right)
            add_scaled(start[rows], product, scale, out=target[rows])


def _float64(array: Array) -> Array:
    return array.double() if is_tensor(array) else array.astype(np.float64)


def _float32(array: Array) -> Array:
    return array.float() if is_tensor(array) else array.astype(np.float32)
