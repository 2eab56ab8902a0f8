"""tall_mask: what enough experts claim; adamerging: coefficients between 0 and 1."""

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import CheckpointError, RecipeError
from freemerge.kernels._masks import pack_mask
from freemerge.testing import poisoned, random_array


def merged(method, base, experts, **given):
    out = poisoned(base.shape, base.dtype)
    methods.get(method).module.merge_tensor(base, experts, name="w", out=out, **given)
    return out


@pytest.fixture
def tensors():
    return [random_array((9, 13), np.float32, seed) for seed in range(4)]


def masks(base, experts, scaling, thresholds):
    vectors = [expert.astype(np.float64) - base for expert in experts]
    total = scaling * sum(vectors)
    return total, [np.abs(v) > lam * np.abs(total - v) for v, lam in zip(vectors, thresholds, strict=True)]


@pytest.mark.parametrize("consensus", [1, 2, 3])
def test_consensus(tensors, consensus):
    base, *experts = tensors
    total, claimed = masks(base, experts, 0.5, [0.4, 0.6, 0.2])
    out = merged("tall_mask", base, experts, scaling=0.5, threshold=(0.4, 0.6, 0.2), consensus=consensus)
    np.testing.assert_allclose(out, base + (sum(m.astype(int) for m in claimed) >= consensus) * total, atol=2e-6)


def test_a_task_alone(tensors):
    base, *experts = tensors
    total, claimed = masks(base, experts, 1.0, [0.4] * 3)
    for t in range(3):
        out = merged("tall_mask", base, experts, scaling=1.0, task=t)
        np.testing.assert_allclose(out, base + claimed[t] * total, atol=2e-6)


@pytest.mark.parametrize("run", [8, 1 << 21])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_experts_beside_the_base_are_the_tasks(tensors, monkeypatch, run, dtype):
    monkeypatch.setattr(methods.get("tall_mask").module, "RUN", run)
    base, *experts = ({"w": tensor.astype(dtype), "b": tensor[0, :5].astype(dtype)} for tensor in tensors)
    given = {"scaling": 0.5, "threshold": [0.4, 0.6, 0.2]}
    merged = merge_state_dicts("tall_mask", base, experts, backbone="base", **given)
    for t, expert in enumerate(merged.experts):
        alone = merge_state_dicts("tall_mask", base, experts, task=t, **given)
        applied = expert.apply(merged)
        for name in base:
            np.testing.assert_array_equal(merged[name], base[name])
            # the shared sum is rounded to the result's dtype, here once more
            ulps = 0 if dtype == np.float32 else 2 * np.finfo(dtype).eps * np.abs(alone[name]).max()
            np.testing.assert_allclose(applied[name], alone[name], rtol=0, atol=ulps)
    assert merge_state_dicts("tall_mask", base, experts, **given).experts == ()


def test_masks_are_packed_alike_by_torch():
    torch = pytest.importorskip("torch")
    for n in (0, 1, 8, 13, 1000):
        kept = np.random.default_rng(n).random(n) < 0.4
        np.testing.assert_array_equal(pack_mask(torch.from_numpy(kept)).numpy(), pack_mask(kept))


def test_any_shape_and_experts_that_do_not_move():
    for shape in ((), (0,), (5,), (2, 3, 4)):
        base, expert = random_array(shape, np.float32, 0), random_array(shape, np.float32, 1)
        np.testing.assert_array_equal(merged("tall_mask", base, [base, base]), base)
        out = merged("tall_mask", base, [expert], consensus=1, scaling=1.0)
        np.testing.assert_allclose(out, expert, atol=1e-6)


def test_a_nan_is_found_though_nobody_claims_it(tensors):
    base, *experts = tensors
    experts[1][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="NaN or Inf in expert1"):
        merge_state_dicts("tall_mask", {"w": base}, [{"w": expert} for expert in experts])


@pytest.mark.parametrize(("given", "message"), [({"consensus": 4}, "3 experts"), ({"task": 3}, "numbered 0 to 2")])
def test_what_cannot_be_met_is_said(tensors, given, message):
    base, *experts = tensors
    with pytest.raises(RecipeError, match=message):
        merge_state_dicts("tall_mask", {"w": base}, [{"w": expert} for expert in experts], **given)


def test_adamerging_keeps_coefficients_between_0_and_1(tensors):
    base, *experts = tensors
    out = merged("adamerging", base, experts, weight=(-0.2, 0.4, 1.7))
    np.testing.assert_allclose(out, base + 0.4 * (experts[1] - base) + (experts[2] - base), atol=2e-6)


def test_adamerging_by_layer(tensors):
    base, expert, *_ = tensors
    weight = [{"filter": "layers.1.", "value": 0.1}, {"filter": "layers.11.", "value": 0.9}, {"value": 0.5}]
    names = ["layers.1.w", "layers.11.w", "norm"]
    models = [{name: array.copy() for name in names} for array in (base, expert)]
    out = merge_state_dicts("adamerging", models[0], models[1:], weight=weight)
    for name, value in zip(names, (0.1, 0.9, 0.5), strict=True):
        np.testing.assert_allclose(out[name], base + value * (expert - base), atol=2e-6)
