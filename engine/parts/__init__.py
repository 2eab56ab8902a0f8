"""What an expert holds of one tensor: a part of one kind, which applies itself to the tensor. Arrays alone, no files.

    rows            sparse entries, added to the tensor or put in the place of what it holds there
    quantized_rows  the same with values of 8 bits
    mask            one bit an entry: where a vector that all experts share is added
    low_rank        a product of two narrow matrices, added
    difference      as many numbers as the tensor has, added

A part is applied with a scale: out = round( tensor + scale * part ). The product is float32, the sum too, or float64
where the tensor is; one rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, dtype_of, empty, is_float
from freemerge.parts.difference import Difference
from freemerge.parts.low_rank import LowRank
from freemerge.parts.mask import Mask
from freemerge.parts.part import Arrays, Layout, Part
from freemerge.parts.quantized_rows import QuantizedRows
from freemerge.parts.rows import Rows

__all__ = [
    "KINDS",
    "Arrays",
    "Cut",
    "Difference",
    "Layout",
    "LowRank",
    "Mask",
    "Part",
    "QuantizedRows",
    "Rows",
    "apply_parts",
]

KINDS: Mapping[str, type[Part]] = {kind.kind: kind for kind in (Rows, QuantizedRows, Mask, LowRank, Difference)}


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
