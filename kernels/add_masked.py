"""add_masked: base plus the weighted sum of what masks, and a sign election, leave of the task vectors."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels._masks import check_mask, unpack_mask
from freemerge.kernels.array import Array, store, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def add_masked(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array | None],
    weights: Sequence[float],
    *,
    votes: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    least: float = 0.0,
    scaling: float = 1.0,
    out: Array,
) -> None:
    """Write base plus the scaled sum of the entries of the task vectors that are kept.

        h_t = experts[t] - base where masks[t] has a bit, else 0
        votes:  g = +1 where sum_t votes[t] * h_t >= 0, else -1;  kept are the entries with sgn(votes[t] * h_t) = g
                (without votes: all that masks[t] has)
        Z = sum over the kept of weights[t] * h_t
        shares: Z / max(D, least), D the sum of the shares[t] of the kept (of 0: Z)
        out = round( base + scaling * Z )

    A sum of zero elects +; an entry of zero has no sign and is never kept by an election; nor is a NaN, which lets -
    be elected. Everything is float32 in the order of `experts`; one rounding. A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype. T may be 0.
        masks: T masks (kernels/_masks.py) over the entries of `base`, None for all of them.
        weights: T numbers, no unit.
        votes: T numbers, if signs are elected.
        shares: T numbers, if what is kept is divided by.
        least: the smallest divisor, if it is above 0.
        scaling: the coefficient lambda on the sum.
        out: like `base`, any float dtype; may be `base` itself.

    Raises:
        ShapeError: arrays or masks do not fit together, or there are not T masks and numbers.

    Source: mergekit's sign consensus; METHODS.md section 15.
    """
    check_like("base", base, experts=experts, out=out)
    for name, values in (("masks", masks), ("weights", weights), ("votes", votes), ("shares", shares)):
        if values is not None:
            check_count(name, values, len(experts), "experts")
    for t, mask in enumerate(masks):
        if mask is not None:
            check_mask(f"masks[{t}]", mask, base)
    run = implementation("add_masked", base) or add_masked_reference
    run(base, experts, masks, weights, votes, shares, least, scaling, out)


def add_masked_reference(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array | None],
    weights: Sequence[float],
    votes: Sequence[float] | None,
    shares: Sequence[float] | None,
    least: float,
    scaling: float,
    out: Array,
) -> None:
    zeros = np.zeros(base.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        entries = [_masked(task_vector(base, e), m) for e, m in zip(experts, masks, strict=True)]
        kept = [np.ones(base.shape, bool) if mask is None else unpack_mask(mask, base.shape) for mask in masks]
        if votes is not None:
            ballots = [np.float32(vote) * entry for vote, entry in zip(votes, entries, strict=True)]
            elected = np.where(sum(ballots, zeros) >= 0, np.float32(1), np.float32(-1))
            kept = [ballot * elected > 0 for ballot in ballots]
        total, divisor = zeros.copy(), zeros.copy()
        for t, (weight, entry) in enumerate(zip(weights, entries, strict=True)):
            total += np.where(kept[t], np.float32(weight) * entry, np.float32(0))
            if shares is not None:
                divisor += np.where(kept[t], np.float32(shares[t]), np.float32(0))
        if shares is not None:
            divisor = np.where(divisor == 0, np.float32(1), divisor)
            total /= np.maximum(divisor, np.float32(least)) if least > 0 else divisor
        start = base if base.dtype == np.float64 else base.astype(np.float32)
        store(start + np.float32(scaling) * total, out)


def _masked(values: Array, mask: Array | None) -> Array:
    return values if mask is None else np.where(unpack_mask(mask, values.shape), values, np.float32(0))
