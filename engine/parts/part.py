"""What parts of all kinds have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, dtype_of, empty
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods._task_vectors import add_update

Arrays = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # role -> dtype and shape


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
        """The same with `move` called on each array; itself where that changes none."""
        arrays = {
            f.name: array for f in fields(self) if f.name != "shape" and (array := getattr(self, f.name)) is not None
        }
        found = {name: move(array) for name, array in arrays.items()}
        return replace(self, **found) if any(found[name] is not array for name, array in arrays.items()) else self

    def rows(self, first: int, last: int) -> "Part":
        """Rows first ... last - 1 (slices along the last dimension) as a part of their own; `first` as `grain` says."""
        raise NotImplementedError

    def expanded(self) -> "Part":
        """The part in the dtypes that ops take; itself where it has them."""
        return self

    def check(self) -> None:
        """Raise ShapeError where its arrays, on the host, are not what they claim to be."""

    def apply(self, array: Array, scale: float, *, out: Array) -> None:
        """Write `array`, of the part's shape, with the part put in; `out` may be `array`. Raises ShapeError."""
        raise NotImplementedError


def add_scaled(array: Array, values: Array, scale: float, *, out: Array) -> None:
    if dtype_of(array) == np.float64:  # the product is float32 there too
        scaled = empty(tuple(array.shape), np.dtype(np.float32), array)
        weighted_sum([values], [scale], out=scaled)
        values, scale = scaled, 1.0
    add_update(array, values, scale, out=out)


def check_shape(part: Part, array: Array) -> None:
    if tuple(array.shape) != tuple(part.shape):
        raise ShapeError(f"a {part.kind} part of {list(part.shape)} for an array of {list(array.shape)}")
