"""Which entries of an array are kept: one bit each, packed as NumPy's packbits does with bitorder="little".

Entry i, in row-major order, is bit i % 8 of byte i // 8; bits after the last entry are 0. Masks of one shape combine
with &, | and ^ as they are.
"""

import sys

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, empty, is_tensor, numel
from freemerge.kernels.checks import check_place


def mask_bytes(n: int) -> int:
    """How many bytes a mask over n entries has."""
    return (n + 7) // 8


def empty_mask(array: Array) -> Array:
    """A mask for the entries of `array`, not filled, of its kind and on its device."""
    return empty((mask_bytes(numel(array)),), np.dtype(np.uint8), array)


def pack_mask(kept: Array) -> Array:
    """The mask of an array of bools, of its kind."""
    if is_tensor(kept) and not isinstance(kept, np.bool_):  # what comparing 0-d arrays gives
        torch = sys.modules["torch"]
        eights = torch.nn.functional.pad(kept.reshape(-1).to(torch.uint8), (0, -kept.numel() % 8)).reshape(-1, 8)
        return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(1, dtype=torch.uint8)
    return np.packbits(np.asarray(kept).reshape(-1), bitorder="little")


def unpack_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """The NumPy array of bools of this shape that a NumPy mask stands for."""
    count = int(np.prod(shape, dtype=np.int64))
    return np.unpackbits(mask, count=count, bitorder="little").astype(bool).reshape(shape)


def check_mask(name: str, mask: Array, array: Array) -> None:
    """`mask` is one for the entries of `array`."""
    dtype = str(mask.dtype).removeprefix("torch.")
    if dtype != "uint8" or tuple(mask.shape) != (mask_bytes(numel(array)),):
        raise ShapeError(
            f"{name} is {dtype} {list(mask.shape)}; a mask over {numel(array)} entries is uint8 "
            f"[{mask_bytes(numel(array))}]"
        )
    if not (mask.is_contiguous() if is_tensor(mask) else mask.flags.c_contiguous):
        raise ShapeError(f"{name} is not contiguous")
    check_place("the array", array, name, mask)
