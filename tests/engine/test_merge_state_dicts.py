import ml_dtypes
import numpy as np
import pytest
import torch

import freemerge
from freemerge.errors import PlanError, RecipeError
from freemerge.testing import tiny_llama


def test_numpy_in_numpy_out():
    base, experts = tiny_llama(0), [tiny_llama(1), tiny_llama(2)]
    kept = {name: array.copy() for name, array in base.items()}
    merged = freemerge.merge_state_dicts("average", base, experts)
    assert list(merged) == sorted(base)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(merged[name], (experts[0][name] + experts[1][name]) / 2, rtol=1e-6)
    for key, array in kept.items():
        np.testing.assert_array_equal(base[key], array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_torch_in_torch_out(dtype):
    make = torch.Generator().manual_seed(0)
    base, expert = ({"w": torch.randn(6, 5, generator=make).to(dtype)} for _ in range(2))
    merged = freemerge.merge_state_dicts("task_arithmetic", base, [expert], scaling=1.0)
    assert merged["w"].dtype == dtype
    # base + (expert - base): the difference is rounded to float32, which the narrower types do not see
    torch.testing.assert_close(merged["w"].to(torch.float64), expert["w"].to(torch.float64), rtol=0, atol=1e-6)


def test_experts_by_name_and_their_application():
    base, math = tiny_llama(0), tiny_llama(1)
    merged = freemerge.merge_state_dicts("free", base, {"math": math}, density=0.1, rescale=1.0)
    (expert,) = merged.experts
    assert expert.name == "math"
    applied = expert.apply(merged)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = applied[name] != merged[name]
    assert changed.sum() == int(merged[name].size * 0.1)
    # what the expert touches is what the fine-tuned model had, up to one rounding of a difference
    np.testing.assert_allclose(applied[name][changed], math[name][changed], atol=1e-8)


def test_a_method_without_base():
    experts = [{"w": np.full(3, value, ml_dtypes.bfloat16)} for value in (1.0, 3.0)]
    merged = freemerge.merge_state_dicts("linear", None, experts, weight=[1.0, 3.0])
    np.testing.assert_array_equal(merged["w"], np.full(3, 2.5, ml_dtypes.bfloat16))


def test_tied_tensors_are_one_tensor_in_the_result():
    dicts = [tiny_llama(seed) for seed in range(2)]
    for tensors in dicts:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    merged = freemerge.merge_state_dicts("fr", dicts[0], dicts[1:])
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]


def test_problems_are_listed():
    with pytest.raises(PlanError, match=r"w: \[3\] in base, \[4\] in expert 0"):
        freemerge.merge_state_dicts("average", {"w": np.zeros(3)}, [{"w": np.zeros(4)}])


def test_a_method_with_base_needs_one():
    with pytest.raises((PlanError, RecipeError), match="base"):
        freemerge.merge_state_dicts("fr", None, [{"w": np.zeros(3)}])


def test_an_unknown_parameter_names_the_nearest():
    with pytest.raises((PlanError, RecipeError), match="scaling"):
        freemerge.merge_state_dicts("fr", {"w": np.zeros(3)}, [{"w": np.zeros(3)}], scalling=1)
