"""count_magnitudes: how many magnitudes of a task vector lie above a threshold, and how many on it."""

from collections.abc import Iterable

import numpy as np

from freemerge.kernels.array import Array, magnitude
from freemerge.kernels.checks import check_magnitude, check_pair
from freemerge.kernels.dispatch import implementation


def count_magnitudes(base: Array | None, expert: Array, value: float) -> tuple[int, int]:
    """Count the entries of |expert - base| greater than `value`, and those equal to it. NaN counts as infinite.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        value: a magnitude as float32, for example from magnitude_threshold.

    Raises:
        ShapeError: arrays do not fit together, or `value` is negative or NaN.

    Source: METHODS.md section 0 (ties).
    """
    check_pair(base, expert)
    check_magnitude(value)
    run = implementation("count_magnitudes", expert) or count_magnitudes_reference
    return run(base, expert, value)


def allot_ties(equal: Iterable[int], ties: int) -> list[int]:
    """Share the `ties` of a threshold over several tensors among them, in order, given how many each one has."""
    shares = []
    for count in equal:
        shares.append(min(count, ties))
        ties -= shares[-1]
    return shares


def count_magnitudes_reference(base: Array | None, expert: Array, value: float) -> tuple[int, int]:
    values = magnitude(base, expert)
    return int(np.sum(values > np.float32(value))), int(np.sum(values == np.float32(value)))
