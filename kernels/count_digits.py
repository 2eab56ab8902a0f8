"""count_digits: a histogram of a digit of a task vector's entries, for order statistics by digits."""

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, magnitude, task_vector
from freemerge.kernels.checks import check_pair
from freemerge.kernels.dispatch import implementation

BITS = 32  # of a key


def count_digits(
    base: Array | None, expert: Array, found: int, below: int, width: int, *, magnitudes: bool = True
) -> Array:
    """Count which digit follows in the entries of expert - base that begin with the digits found so far.

    An entry's key is its float32 as 32 bits that are ordered like the numbers (`value_of` is the way back): a digit is
    a run of `width` bits of it, `below` bits from its end. Nothing is sorted or copied.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        found: a key; only entries are counted whose bits above the digit are those of it.
        below, width: number of bits, above 0 in all at most 32; width at most 16.
        magnitudes: of absolute values, where NaN counts as infinite.

    Returns:
        int64 [2**width].

    Raises:
        ShapeError: arrays do not fit together, or there is no such digit.

    Source: METHODS.md sections 2 and 6 (thresholds over the model).
    """
    check_pair(base, expert)
    if not (0 < width <= 16 and 0 <= below <= BITS - width and 0 <= found < 1 << BITS):
        raise ShapeError(f"no digit of {width} bits with {below} below it of {found:#x}: keys have {BITS} bits")
    run = implementation("count_digits", expert) or count_digits_reference
    return run(base, expert, found, below, width, magnitudes)


def value_of(key: int) -> float:
    """The number of this key."""
    bits = key - (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def count_digits_reference(
    base: Array | None, expert: Array, found: int, below: int, width: int, magnitudes: bool
) -> Array:
    values = magnitude(base, expert) if magnitudes else task_vector(base, expert)
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)
    begun = keys >> (below + width) == found >> (below + width)
    return np.bincount(keys[begun] >> below & (1 << width) - 1, minlength=1 << width)
