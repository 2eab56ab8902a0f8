"""From weights, normalize and scaling to the one coefficient of each expert."""

from collections.abc import Sequence

NEAR_ZERO = 1e-8  # mergekit: a sum of weights smaller than this divides by 1


def per_expert(weight: float | Sequence[float], count: int) -> list[float]:
    """One weight for each of `count` experts; a single number stands for all."""
    if isinstance(weight, Sequence):
        return [float(w) for w in weight]
    return [float(weight)] * count


def coefficients(weights: Sequence[float], scaling: float, normalize: bool) -> list[float]:
    """scaling * weights, divided by the sum of the weights if `normalize`."""
    total = sum(weights) if normalize else 1.0
    if abs(total) < NEAR_ZERO:
        total = 1.0
    return [scaling * weight / total for weight in weights]
