"""count_range: histograms of ranges of a task vector's entries, for order statistics without sorting."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, magnitude, task_vector
from freemerge.kernels.checks import check_count, check_pair
from freemerge.kernels.dispatch import implementation

KEYS = 1 << 32


def count_range(
    base: Array | None,
    expert: Array,
    lows: Sequence[int],
    shifts: Sequence[int],
    bins: int,
    *,
    magnitudes: bool = True,
) -> Array:
    """Count, for each of K ranges, the entries of expert - base below it, in each of its bins, and above it.

    An entry's key is its float32 as 32 bits that are ordered like the numbers (`keys_of`; `value_of` is the way back).
    Bin j of range k holds the keys from lows[k] + (j << shifts[k]) on, 1 << shifts[k] of them. Nothing is sorted or
    copied, and the entries are read once.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        lows, shifts: K keys and numbers of bits; no range goes beyond the keys there are.
        bins: of each range.
        magnitudes: of absolute values, where NaN counts as infinite.

    Returns:
        int64 [K, bins + 2].

    Raises:
        ShapeError: arrays do not fit together, or there is no such range.

    Source: METHODS.md sections 2 and 6 (thresholds over the model).
    """
    check_pair(base, expert)
    check_count("shifts", shifts, len(lows), "lows")
    for low, shift in zip(lows, shifts, strict=True):
        if not (bins > 0 and low >= 0 and shift >= 0 and low + (bins << shift) <= KEYS):
            raise ShapeError(f"no range of {bins} bins of 2**{shift} keys from {low:#x} on: keys have 32 bits")
    run = implementation("count_range", expert) or count_range_reference
    return run(base, expert, lows, shifts, bins, magnitudes)


def keys_of(values: Array) -> Array:
    """int64: the keys of float32 numbers in memory."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def value_of(key: int) -> float:
    """The number of this key."""
    bits = key - (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def count_range_reference(
    base: Array | None, expert: Array, lows: Sequence[int], shifts: Sequence[int], bins: int, magnitudes: bool
) -> Array:
    keys = keys_of(magnitude(base, expert) if magnitudes else task_vector(base, expert))
    counts = np.empty((len(lows), bins + 2), np.int64)
    for row, low, shift in zip(counts, lows, shifts, strict=True):
        row[:] = np.bincount(np.clip((keys - low >> shift) + 1, 0, bins + 1), minlength=bins + 2)
    return counts
