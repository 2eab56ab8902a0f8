"""One bit an entry: where a vector that all experts share is added."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from freemerge.kernels._masks import mask_bytes
from freemerge.kernels.add_masked_vector import add_masked_vector
from freemerge.kernels.array import Array, rows_of
from freemerge.parts.part import Arrays, Layout, Part


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
