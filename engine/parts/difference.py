"""As many numbers as the tensor has, added."""

import math
from dataclasses import dataclass

import numpy as np

from freemerge.kernels.array import Array, rows_of
from freemerge.parts.part import Arrays, Layout, Part, add_scaled, check_shape


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
        check_shape(self, array)
        add_scaled(array, self.difference, scale, out=out)
