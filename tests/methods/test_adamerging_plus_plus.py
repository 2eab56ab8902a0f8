"""adamerging_plus_plus: what TIES selects, weighted; against ties_merging's sum and the selection written out."""

import numpy as np
import pytest

from freemerge import merge_state_dicts
from freemerge.errors import RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array

SHAPES = {"a.weight": (40, 33), "b.bias": (301,), "c.scale": (), "d.empty": (0, 4)}
METHOD = "adamerging_plus_plus"


def moved(array, seed):
    return np.asarray(array + random_array(array.shape, array.dtype, seed, 0.1), array.dtype)


def models(count, dtype=np.float32):
    base = {name: random_array(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
    return base, [
        {name: moved(array, 9 * t + i) for i, (name, array) in enumerate(base.items())} for t in range(1, count + 1)
    ]


def selected(base, experts, density):
    """METHODS.md section 2 over the flat model, float64: the entries of each task vector that are left."""
    start = np.concatenate([base[name].astype(np.float32).ravel() for name in base])
    vectors = np.array(
        [np.concatenate([one[n].astype(np.float32).ravel() for n in base]) - start for one in experts], np.float32
    )
    floors = np.sort(np.abs(vectors), 1)[:, max(vectors.shape[1] - int(vectors.shape[1] * density), 1) - 1]
    kept = np.where(np.abs(vectors) >= floors[:, None], vectors, 0)
    signs = np.sign(kept.sum(0))
    majority = np.sign(signs.sum())
    signs[signs == 0] = majority
    return start, np.where(np.where(signs > 0, kept > 0, kept < 0), kept, 0).astype(float)


def flat(tensors):
    return np.concatenate([array.astype(float).ravel() for array in tensors.values()])


@pytest.mark.parametrize("weight", [0.3, [0.0, 0.7, 1.0], [0.2, -1.0, 4.0]], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_as_written_out(density, weight):
    base, experts = models(3)
    merged = merge_state_dicts(METHOD, base, experts, weight=weight, density=density)
    start, entries = selected(base, experts, density)
    clipped = np.broadcast_to(np.clip(weight, 0, 1), 3)
    # float32 weights near 1
    np.testing.assert_allclose(flat(merged), start + clipped @ entries, rtol=0, atol=5e-7)


def test_equal_weights_are_the_sum_of_ties():
    base, experts = models(4)
    merged = merge_state_dicts(METHOD, base, experts, weight=0.4)
    ties = merge_state_dicts("ties_merging", base, experts, combination="sum", scaling=0.4)
    np.testing.assert_allclose(flat(merged), flat(ties), rtol=0, atol=3e-7)


@pytest.mark.parametrize("more", [0, 1, -1], ids=["balanced", "positive", "negative"])
def test_votes_that_cancel_take_the_majority_sign(more):
    base = {"w": np.zeros(4, np.float32)}
    experts = [{"w": np.array([1, -1, 1, 2 * more], np.float32)}, {"w": np.array([-1, 1, 1, more], np.float32)}]
    experts[1]["w"][2] = -3  # + and - once each, but for what `more` says
    merged = merge_state_dicts(METHOD, base, experts, weight=[0.5, 1.0], density=1.0)["w"]
    start, entries = selected(base, experts, 1.0)
    np.testing.assert_allclose(merged, start + np.array([0.5, 1.0]) @ entries, atol=1e-7)


def test_runs_of_a_large_tensor_and_one_rounding(monkeypatch):
    base, experts = models(2, BFLOAT16)
    whole = merge_state_dicts(METHOD, base, experts)
    monkeypatch.setattr("freemerge.methods._trimming.RUN", 100)
    pieces = merge_state_dicts(METHOD, base, experts)
    start, entries = selected(base, experts, 0.2)
    for name in base:
        np.testing.assert_array_equal(whole[name], pieces[name])
    np.testing.assert_array_equal(flat(whole), (start + 0.3 * entries.sum(0)).astype(BFLOAT16).astype(float))


def test_density_is_a_share():
    base, experts = models(2)
    with pytest.raises(RecipeError, match="density is 20"):
        merge_state_dicts(METHOD, base, experts, density=20)
