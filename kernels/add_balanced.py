"""add_balanced: base plus the mean of clipped task vectors, each entry weighed by its score, as in PCB-Merging."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, store
from freemerge.kernels.balance_scores import inverse_of, scored
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation

LEAST = 1e-12  # sum of the weights of an entry


def add_balanced(
    base: Array,
    experts: Sequence[Array],
    lows: Sequence[float],
    highs: Sequence[float],
    floors: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    *,
    normalized: bool,
    out: Array,
) -> None:
    """Write base plus the balanced mean of the task vectors.

        c_t = sgn(tau_t) * a_t, and scores B_t: as in balance_scores
        W_t = (clip(B_t, floors[t], tops[t]) - floors[t]) / (tops[t] - floors[t]), of equal ones 0
        out = round( base + sum_t weights[t] * c_t * W_t / max( sum_t W_t, 1e-12 ) )

    Everything is float32 in the order of `experts`; one rounding. A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype.
        lows, highs: T magnitudes each.
        floors, tops: T scores each.
        weights: T numbers, no unit.
        normalized: which sum the sign of an entry is compared with.
        out: like `base`, any float dtype; may be `base` itself.

    Raises:
        ShapeError: arrays do not fit together, or there are not T numbers.

    Source: PCB-Merging, METHODS.md section 6.
    """
    check_like("base", base, experts=experts, out=out)
    numbers = {"lows": lows, "highs": highs, "floors": floors, "tops": tops, "weights": weights}
    for name, values in numbers.items():
        check_count(name, values, len(experts), "experts")
    run = implementation("add_balanced", base) or add_balanced_reference
    run(base, experts, lows, highs, floors, tops, weights, normalized, out)


def add_balanced_reference(
    base: Array,
    experts: Sequence[Array],
    lows: Sequence[float],
    highs: Sequence[float],
    floors: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    normalized: bool,
    out: Array,
) -> None:
    total, divisor = np.zeros(base.shape, np.float32), np.zeros(base.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        clipped, scores = scored(base, experts, lows, highs, normalized)
        for entries, score, floor, top, weight in zip(clipped, scores, floors, tops, weights, strict=True):
            share = (np.clip(score, np.float32(floor), np.float32(top)) - np.float32(floor)) * inverse_of(floor, top)
            total += np.float32(weight) * entries * share
            divisor += share
        start = base if base.dtype == np.float64 else base.astype(np.float32)
        store(np.asarray(start + total / np.maximum(divisor, np.float32(LEAST))), out)
