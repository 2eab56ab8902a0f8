"""add_trimmed: base plus what a sign election leaves of task vectors trimmed at thresholds, as TIES has it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, store, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation

Combination = Literal["mean", "sum", "max"]
COMBINATIONS = ("mean", "sum", "max")


def add_trimmed(
    base: Array,
    experts: Sequence[Array],
    floors: Sequence[float],
    *,
    zeros: int,
    combination: Combination = "mean",
    scaling: float = 1.0,
    out: Array,
) -> None:
    """Write base plus the scaled mean, sum or maximum of the trimmed entries whose sign is the elected one.

        h_t = experts[t] - base where its magnitude is at least floors[t], else 0
        g = sgn( sum_t h_t ), where that is 0: `zeros`
        kept are the h_t > 0 where g is 1, else the h_t < 0;  Z = their mean (of none: 0), their sum, or g * max |h_t|
        out = round( base + scaling * Z )

    Everything is float32 in the order of `experts`; one rounding. A float64 base is added in float64.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype.
        floors: T magnitudes.
        zeros: 1, 0 or -1, the sign of a sum of 0.
        combination: of what is kept.
        scaling: the coefficient lambda on Z.
        out: like `base`, any float dtype; may be `base` itself.

    Raises:
        ShapeError: arrays do not fit together, or there are not T floors.

    Source: TIES-Merging, METHODS.md section 2.
    """
    check_like("base", base, experts=experts, out=out)
    check_count("floors", floors, len(experts), "experts")
    if zeros not in (-1, 0, 1) or combination not in COMBINATIONS:
        raise ShapeError(f"zeros {zeros}, combination {combination}: give -1, 0 or 1, and one of {COMBINATIONS}")
    run = implementation("add_trimmed", base) or add_trimmed_reference
    run(base, experts, floors, zeros, combination, scaling, out)


def trimmed(base: Array, experts: Sequence[Array], floors: Sequence[float]) -> list[Array]:
    """float32: the task vectors of NumPy arrays, 0 where their magnitude is below the floor."""
    vectors = [task_vector(base, expert) for expert in experts]
    pairs = zip(vectors, floors, strict=True)
    return [np.where(np.abs(vector) < np.float32(floor), np.float32(0), vector) for vector, floor in pairs]


def add_trimmed_reference(
    base: Array,
    experts: Sequence[Array],
    floors: Sequence[float],
    zeros: int,
    combination: str,
    scaling: float,
    out: Array,
) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        entries = trimmed(base, experts, floors)
        nothing = np.zeros(base.shape, np.float32)
        total = sum(entries, nothing)
        signs = np.where(total == 0, np.float32(zeros), np.where(total > 0, np.float32(1), np.float32(-1)))
        kept = [np.where(np.where(signs > 0, h > 0, h < 0), h, np.float32(0)) for h in entries]
        if combination == "max":
            merged = signs * np.max([np.abs(h) for h in kept], axis=0, initial=0)
        else:
            merged = sum(kept, nothing)
        if combination == "mean":
            merged = merged / np.maximum(sum(((h != 0).astype(np.float32) for h in kept), nothing), np.float32(1))
        start = base if base.dtype == np.float64 else base.astype(np.float32)
        store(np.asarray(start + np.float32(scaling) * merged), out)
