"""balance_scores: how much each entry of each task vector counts against the others', as PCB-Merging has it."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, dtype_of, numel, task_vector
from freemerge.kernels.checks import check_count, check_float, check_like
from freemerge.kernels.dispatch import implementation


def balance_scores(
    base: Array,
    experts: Sequence[Array],
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    normalized: bool,
    out: Array,
) -> None:
    """Write the scores of the task vectors tau_t = experts[t] - base.

        a_t = clip(|tau_t|, lows[t], highs[t]);   n_t = (a_t - lows[t]) / (highs[t] - lows[t]), of equal ones 0
        out[t] = exp(T * n_t^2) * tanh(tau_t * S),   S = sum_s tau_s, or where `normalized` sum_s sgn(tau_s) * n_s

    Everything is float32 in the order of `experts`.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype.
        lows, highs: T magnitudes each.
        normalized: which sum the sign of an entry is compared with.
        out: [T, n] float32, contiguous.

    Raises:
        ShapeError: arrays do not fit together, or there are not T magnitudes.

    Source: PCB-Merging, METHODS.md section 6.
    """
    check_like("base", base, experts=experts)
    for name, values in (("lows", lows), ("highs", highs)):
        check_count(name, values, len(experts), "experts")
    check_float("out", out)
    shape = (len(experts), numel(base))
    if dtype_of(out) != np.float32 or tuple(out.shape) != shape:
        raise ShapeError(f"out is {out.dtype} {list(out.shape)}; scores are float32 {list(shape)}")
    run = implementation("balance_scores", base) or balance_scores_reference
    run(base, experts, lows, highs, normalized, out)


def scored(
    base: Array, experts: Sequence[Array], lows: Sequence[float], highs: Sequence[float], normalized: bool
) -> tuple[list[Array], list[Array]]:
    """float32, of NumPy arrays: sgn(tau_t) * a_t, and the scores."""
    vectors = [task_vector(base, expert) for expert in experts]
    bounds = [(np.float32(low), np.float32(high)) for low, high in zip(lows, highs, strict=True)]
    clipped = [np.clip(np.abs(v), *own) for v, own in zip(vectors, bounds, strict=True)]
    shares = [(a - low) * inverse_of(low, high) for a, (low, high) in zip(clipped, bounds, strict=True)]
    signed = [np.sign(v) * n for v, n in zip(vectors, shares, strict=True)] if normalized else vectors
    total, count = sum(signed, np.zeros(base.shape, np.float32)), np.float32(len(experts))
    scores = [np.exp(count * (n * n)) * np.tanh(v * total) for v, n in zip(vectors, shares, strict=True)]
    return [np.sign(v) * a for v, a in zip(vectors, clipped, strict=True)], scores


def inverse_of(low: float, high: float) -> np.float32:
    """1 / (high - low) in float32; 0 where they are equal."""
    low, high = np.float32(low), np.float32(high)
    return np.float32(0) if low == high else np.float32(1) / (high - low)


def balance_scores_reference(
    base: Array, experts: Sequence[Array], lows: Sequence[float], highs: Sequence[float], normalized: bool, out: Array
) -> None:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for t, scores in enumerate(scored(base, experts, lows, highs, normalized)[1]):
            out[t] = scores.reshape(-1)
