"""Probabilities that mean what they say, and the confidence below which the backbone alone is better."""

from dataclasses import dataclass

import numpy as np

from freemerge.errors import InputError

_SCALES = (1e-6, 1e6)  # between which 1 / temperature is searched
_HALVINGS = 100  # of that range's logarithm: beyond the last bit


@dataclass(frozen=True)
class Calibration:
    """What `Router.calibrate` found on held-out rows.

    Attributes:
        rows: how many.
        temperature: fitted; 1 leaves logits as they are.
        nll_before, nll: mean negative log likelihood, in nats, of the rows that have an expert, at temperature 1 and
            at the fitted one.
        threshold: chosen.
        accuracy: share of right ones among the rows that get an expert; 1 where none does.
        coverage: share of the rows that get an expert.
        accuracy_of_all: share of right ones with no threshold.
    """

    rows: int
    temperature: float
    nll_before: float
    nll: float
    threshold: float
    accuracy: float
    coverage: float
    accuracy_of_all: float


def calibrate(logits: np.ndarray, indices: np.ndarray, accuracy: float | None, coverage: float | None) -> Calibration:
    """Temperature and threshold for [n, T] logits whose right experts are `indices`, -1 where no expert is right."""
    _check(logits, indices, accuracy, coverage)
    logits, known = logits.astype(np.float64), indices >= 0
    temperature = fit_temperature(logits[known], indices[known])
    probabilities = softmax(logits / temperature)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == indices
    threshold = choose_threshold(confidence, right, accuracy, coverage)
    kept = confidence >= threshold
    return Calibration(
        rows=len(logits),
        temperature=temperature,
        nll_before=_nll(logits[known], indices[known]),
        nll=_nll(logits[known] / temperature, indices[known]),
        threshold=threshold,
        accuracy=float(right[kept].mean()) if kept.any() else 1.0,
        coverage=float(kept.mean()),
        accuracy_of_all=float(right.mean()),
    )


def _check(logits: np.ndarray, indices: np.ndarray, accuracy: float | None, coverage: float | None) -> None:
    if len(logits) != len(indices):
        raise InputError(f"{len(logits)} rows of features, {len(indices)} labels")
    if not (indices >= 0).any():
        raise InputError("calibrate needs held-out rows of the router's experts")
    if accuracy is not None and coverage is not None:
        raise InputError("calibrate takes a wanted accuracy or a wanted coverage, not both")
    for name, wanted in (("accuracy", accuracy), ("coverage", coverage)):
        if wanted is not None and not 0 < wanted <= 1:
            raise InputError(f"{name} {wanted}: a share, above 0 and up to 1")


def fit_temperature(logits: np.ndarray, indices: np.ndarray) -> float:
    """The temperature of least negative log likelihood, which is convex in 1 / temperature.

    As if one row more had been seen, whose expert were any with equal probability: where all rows are right, the
    likelihood alone would have all confidence at 1.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599; Platt's targets, 1999.
    """
    n, count = logits.shape
    targets = np.full(logits.shape, 1 / count)
    targets[np.arange(n), indices] += n
    targets /= n + 1
    if np.ptp(logits, axis=1).max(initial=0.0) == 0:
        return 1.0

    def slope(scale: float) -> float:
        return float(((softmax(scale * logits) - targets) * logits).sum())

    low, high = np.log(_SCALES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def choose_threshold(
    confidence: np.ndarray, right: np.ndarray, accuracy: float | None, coverage: float | None
) -> float:
    """The threshold as `Router.calibrate` says; half-way between the confidences it separates."""
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    ends = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True)) + 1  # equal ones stay together
    accuracies = np.cumsum(right)[ends - 1] / ends
    if accuracy is None and coverage is None:
        return 0.0
    if coverage is not None:
        end = ends[np.argmax(ends >= coverage * len(right))]
    else:
        reached = np.flatnonzero(accuracies >= accuracy)
        if not len(reached):
            best = int(accuracies.argmax())
            raise InputError(
                f"accuracy {accuracy:g} is not reached at any threshold: at best {accuracies[best]:.4g}, "
                f"with {ends[best]} of {len(right)} rows"
            )
        end = ends[reached[-1]]
    return 0.0 if end == len(right) else float((confidence[end - 1] + confidence[end]) / 2)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension, float64."""
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _nll(logits: np.ndarray, indices: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_likelihood = shifted[np.arange(len(logits)), indices] - np.log(np.exp(shifted).sum(axis=1))
    return float(-log_likelihood.mean())
