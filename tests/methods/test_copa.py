"""copa: against the formulas written out plainly, for factors of every kind; what pairs with what."""

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import CheckpointError, PlanError, RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array

Q, CONV, WORDS = "base_model.model.q_proj", "base_model.model.conv", "base_model.model.embed"
SHAPES = {
    f"{Q}.lora_A.weight": (4, 11),
    f"{Q}.lora_B.weight": (7, 4),
    f"{CONV}.lora_A.weight": (3, 2, 3, 3),
    f"{CONV}.lora_B.weight": (5, 3, 1, 1),
    f"{WORDS}.lora_embedding_A": (5, 20),
    f"{WORDS}.lora_embedding_B": (6, 5),
    "base_model.model.norm.weight": (9,),
}


def adapters(count, dtype=np.float32):
    return [
        {name: random_array(shape, dtype, 100 * t + i) for i, (name, shape) in enumerate(SHAPES.items())}
        for t in range(count)
    ]


def trim(factor, mask_ratio):
    ranked = np.sort(np.abs(factor).ravel())
    k = int(factor.size * (1 - mask_ratio))
    return np.where(np.abs(factor) >= ranked[max(k - 1, 0)], factor, 0)


def published(experts, mask_ratio=0.2, att_ratio=0.2, fuse_weight=2.0):
    """METHODS.md section 11, in float64."""
    experts = [{name: array.astype(np.float64) for name, array in one.items()} for one in experts]
    merged = {"base_model.model.norm.weight": np.mean([one["base_model.model.norm.weight"] for one in experts], 0)}
    plain = ("lora_A.weight", "lora_B.weight")
    for module, a, b in [(Q, *plain), (CONV, *plain), (WORDS, "lora_embedding_A", "lora_embedding_B")]:
        clipped, left, right = [], 0, 0
        for one in experts:
            matrix = one[f"{module}.{a}"]
            rows, kept = (np.abs(m).reshape(len(matrix), -1).sum(1) for m in (matrix, trim(matrix, mask_ratio)))
            s = np.where(kept > 0, rows / np.where(kept > 0, kept, 1), 0)
            s[kept == 0] = s.max()
            z = np.sort(s)
            clipped.append(np.clip(s, z[min(int(len(s) * (1 - att_ratio)), len(s) - 1)], z[-1]))
            right = right + trim(matrix, mask_ratio)
            factor = trim(one[f"{module}.{b}"], mask_ratio)
            left = left + factor * clipped[-1].reshape(1, -1, *(1 for _ in factor.shape[2:]))
        merged[f"{module}.{a}"] = fuse_weight * right
        merged[f"{module}.{b}"] = fuse_weight * left / sum(clipped).reshape(1, -1, *(1 for _ in left.shape[2:]))
    return merged


def close(merged, expected, rtol=1e-6):
    assert merged.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            merged[name].astype(float), array, rtol=0, atol=rtol * np.abs(array).max(), err_msg=name
        )


@pytest.mark.parametrize(
    "given", [{}, {"mask_ratio": 0.5, "att_ratio": 0.6}, {"mask_ratio": 1, "att_ratio": 0, "fuse_weight": 1}], ids=str
)
@pytest.mark.parametrize("count", [1, 3])
def test_as_published(count, given):
    experts = adapters(count)
    close(merge_state_dicts("copa", None, experts, **given), published(experts, **given))


def test_one_rounding_to_bfloat16():
    experts = adapters(3, BFLOAT16)
    close(merge_state_dicts("copa", None, experts), published(experts), rtol=4e-3)


def test_b_is_weighted_by_the_a_of_its_own_module_whatever_the_order():
    experts = adapters(2)
    swapped = {Q: CONV, CONV: WORDS, WORDS: Q}

    def renamed(name):
        module = next((module for module in swapped if name.startswith(module)), None)
        return name.replace(module, f"base_model.model.{'zyx'[list(swapped).index(module)]}") if module else name

    moved = [{renamed(name): array for name, array in reversed(one.items())} for one in experts]
    expected = merge_state_dicts("copa", None, experts)
    found = merge_state_dicts("copa", None, moved)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[renamed(name)], array, err_msg=name)


def test_a_row_trimmed_away_counts_as_the_strongest_of_its_adapter():
    experts = adapters(2)
    for one in experts:
        one[f"{Q}.lora_A.weight"][1] *= 1e-6
    merged = merge_state_dicts("copa", None, experts, att_ratio=1)
    s = []
    for one in experts:
        a = one[f"{Q}.lora_A.weight"].astype(float)
        with np.errstate(divide="ignore"):
            s.append(np.abs(a).sum(1) / np.abs(trim(a, 0.2)).sum(1))
        s[-1][np.isinf(s[-1])] = s[-1][np.isfinite(s[-1])].max()
    trimmed = [trim(one[f"{Q}.lora_B.weight"].astype(float), 0.2) for one in experts]
    expected = 2 * sum(b * c for b, c in zip(trimmed, s, strict=True)) / sum(s)
    np.testing.assert_allclose(merged[f"{Q}.lora_B.weight"], expected, rtol=0, atol=1e-6)


def test_zeros_and_nothing():
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    close(merge_state_dicts("copa", None, [zeros, zeros]), zeros)
    empty = {"m.lora_A.weight": np.zeros((2, 0), np.float32), "m.lora_B.weight": np.zeros((0, 2), np.float32)}
    assert merge_state_dicts("copa", None, [empty, empty])["m.lora_A.weight"].shape == (2, 0)


@pytest.mark.parametrize("name", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_found(name, value):
    experts = adapters(2)
    experts[1][name].reshape(-1)[2] = value
    with pytest.raises(CheckpointError, match="NaN or Inf in expert1"):
        merge_state_dicts("copa", None, experts)


def test_what_cannot_be_merged():
    one, other = adapters(2)
    with pytest.raises(RecipeError, match=r"mask_ratio is 1\.5"):
        merge_state_dicts("copa", None, [one, other], mask_ratio=1.5)
    with pytest.raises(PlanError, match="expert1: no LoRA adapter"):
        merge_state_dicts("copa", None, [one, {"norm.weight": np.zeros(3, np.float32)}])
    halved = {name: array for name, array in other.items() if name != f"{Q}.lora_B.weight"}
    with pytest.raises(PlanError, match=f"expert1: {Q}: an A without a B"):
        merge_state_dicts("copa", None, [one, halved])
    magnitudes = one | {f"{Q}.lora_magnitude_vector.weight": np.ones(7, np.float32)}
    with pytest.raises(PlanError, match="expert0: a DoRA adapter"):
        merge_state_dicts("copa", None, [magnitudes, magnitudes])
    more = other | {"base_model.model.head.weight": np.ones(7, np.float32)}
    with pytest.raises(PlanError, match=r"head\.weight: missing from expert0, in expert1"):
        merge_state_dicts("copa", None, [one, more])


def test_the_plan_says_what_is_done():
    given = {p.name: p.default for p in methods.get("copa").parameters.values()}
    words = [methods.get("copa").module.plan_tensor(n, s, experts=2, **given).transform for n, s in SHAPES.items()]
    assert words[0] == "largest entries, summed"
    assert "A's" in words[1]
    assert words[-1] == "mean"
