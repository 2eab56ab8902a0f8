"""doge: the shift against the gradient of its loss in float64, thresholds over the whole model, what stays."""

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import CheckpointError, RecipeError
from freemerge.testing import random_array

SHAPES = {"a.weight": (12, 18), "b.weight": (18, 12), "c.bias": (18,), "embed.weight": (9, 12), "norm.weight": (12,)}


def models(count, scale=0.1):
    base = {name: random_array(shape, np.float32, i) for i, (name, shape) in enumerate(SHAPES.items())}
    return base, [
        {
            name: array + random_array(array.shape, np.float32, 50 * t + i, scale)
            for i, (name, array) in enumerate(base.items(), 1)
        }
        for t in range(1, count + 1)
    ]


def published(
    base, experts, density=0.3, scaling=0.07, subspace=6, steps=400, rate=1e-4, names=("a.weight", "b.weight")
):
    """METHODS.md section 10 in float64."""
    vectors = [{name: expert[name].astype(np.float64) - base[name] for name in names} for expert in experts]
    thresholds = []
    for vector in vectors:
        magnitudes = np.sort(np.abs(np.concatenate([vector[name].ravel() for name in names]).astype(np.float32)))
        kept = len(magnitudes) - int(len(magnitudes) * density)
        thresholds.append(magnitudes[kept - 1] if kept else 0.0)
    merged = dict(base)
    for name in names:
        taus = [vector[name] for vector in vectors]
        weights = [scaling / np.linalg.norm(tau) if tau.any() else 0.0 for tau in taus]
        shift = optimised(taus, weights, subspace, steps, rate)
        masks = [np.abs(tau.astype(np.float32)) >= value for tau, value in zip(taus, thresholds, strict=True)]
        update = sum(w * mask * (tau + shift) for w, mask, tau in zip(weights, masks, taus, strict=True))
        merged[name] = base[name] + update
    return merged


def optimised(taus, weights, subspace, steps, rate):
    n = min(taus[0].shape)
    stack = np.concatenate([np.linalg.svd(tau)[0][:, : n // len(taus)] for tau in taus if tau.any()], 1)
    protected = np.linalg.svd(stack)[0][:, : int(n / subspace)]
    shift, mean, square = np.zeros((3, *taus[0].shape))
    total, weighted = sum(weights), sum(w * tau for w, tau in zip(weights, taus, strict=True))
    for step in range(1, steps + 1):
        errors = [(tau * (tau - weighted - total * shift)).sum(1, keepdims=True) for tau in taus]
        gradient = -2 * total * sum(error * tau for error, tau in zip(errors, taus, strict=True))
        gradient -= protected @ (protected.T @ gradient)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        shift = shift - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return shift


def close(merged, expected, base):
    # rounding is amplified where the gradient is near 0: METHODS.md allows 1e-3 of the update
    for name in expected:
        size = np.abs(expected[name] - base[name].astype(np.float64)).max()
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=1e-3 * size + 2e-7, err_msg=name)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_matches_float64(count):
    base, experts = models(count)
    close(merge_state_dicts("doge", base, experts), published(base, experts), base)


@pytest.mark.parametrize(
    "given", [{"density": 1.0}, {"scaling": 0.5}, {"subspace": 2}, {"steps": 3}, {"steps": 0}], ids=str
)
def test_parameters(given):
    base, experts = models(2)
    close(merge_state_dicts("doge", base, experts, **given), published(base, experts, **given), base)


def test_what_is_not_chosen_stays():
    base, experts = models(2)
    merged = merge_state_dicts("doge", base, experts, include=["^b"])
    for name in ("a.weight", "c.bias", "embed.weight", "norm.weight"):
        np.testing.assert_array_equal(merged[name], base[name])
    close(merged, published(base, experts, names=("b.weight",)), base)  # and does not compete


def test_nothing_chosen_at_all():
    base, experts = models(2)
    merged = merge_state_dicts("doge", base, experts, include=["nowhere"])
    for name, array in base.items():
        np.testing.assert_array_equal(merged[name], array)


def test_an_expert_that_does_not_move():
    base, experts = models(2)
    with_still = [*experts, base]
    close(merge_state_dicts("doge", base, with_still), published(base, with_still), base)
    for name, array in merge_state_dicts("doge", base, [base, base]).items():
        np.testing.assert_array_equal(array, base[name])


def test_one_expert():
    """The directions its shift may not take are arbitrary; without a shift it is trimmed."""
    base, experts = models(1)
    close(merge_state_dicts("doge", base, experts, steps=0), published(base, experts, steps=0), base)
    assert all(np.all(np.isfinite(array)) for array in merge_state_dicts("doge", base, experts).values())


@pytest.mark.parametrize(("given", "message"), [({"density": 0.0}, "density"), ({"subspace": 0.5}, "subspace")])
def test_what_makes_no_sense_is_said(given, message):
    base, experts = models(2)
    with pytest.raises(RecipeError, match=message):
        merge_state_dicts("doge", base, experts, **given)


def test_a_nan_is_found_where_it_is():
    base, experts = models(2)
    experts[1]["a.weight"][3, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"a\.weight: NaN or Inf in expert1"):
        merge_state_dicts("doge", base, experts)


def test_at_most_five_sweeps_before_the_merge():
    assert (methods.get("doge").scope, methods.get("doge").sweeps) == ("model", 5)
