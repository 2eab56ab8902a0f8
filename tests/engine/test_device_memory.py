"""State dicts of tensors on a device: merged there, from there, to there. CPU tensors play the device's part."""

import numpy as np
import pytest
import torch

import freemerge
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.torch_arrays import from_torch, placed_like, to_torch
from freemerge.errors import CheckpointError, PlanError, UnavailableError
from freemerge.kernels import dispatch
from freemerge.methods import get
from freemerge.placement import check_together
from freemerge.plan import make_plan
from freemerge.recipe import Recipe
from freemerge.testing import random_array, tiny_llama

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def stand_ins(gpu_calls, monkeypatch):
    monkeypatch.setattr(dispatch, "_cpu", None)  # the references on the CPU too: the same bytes


def tensors(arrays):
    return {name: to_torch(array) for name, array in arrays.items()}


def arrays(tensors):
    return {name: from_torch(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)], ids=str)
def test_tensors_stay_where_they_are(dtype, shape):
    given = to_torch(random_array(shape, np.float32, 0)).to(dtype)
    checkpoint = MemoryCheckpoint({"w": given}, "mine", device=CPU)
    assert checkpoint.read("w").data_ptr() == given.data_ptr()
    assert checkpoint.read("w").dtype == dtype
    as_array = MemoryCheckpoint({"w": given}, "mine")
    assert checkpoint.tensors == as_array.tensors
    assert checkpoint.fingerprint() == as_array.fingerprint()


def test_what_is_out_of_order_or_has_a_gradient_is_made_plain():
    given = {"t": torch.arange(24.0).reshape(4, 6).T, "p": torch.nn.Parameter(torch.ones(3))}
    checkpoint = MemoryCheckpoint(given, "mine", device=CPU)
    assert checkpoint.read("t").is_contiguous()
    assert not checkpoint.read("p").requires_grad
    assert checkpoint.tied == {}


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "fr", "free"])
def test_tensors_are_merged_where_they_lie(gpu_calls, method):
    base, *experts = (tiny_llama(seed) for seed in range(3))
    merged = freemerge.merge_state_dicts(method, tensors(base), list(map(tensors, experts)), device="interpreter")
    assert gpu_calls
    expected = freemerge.merge_state_dicts(method, base, experts)
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(from_torch(tensor), expected[name])


@pytest.mark.parametrize("method", ["average", "free"])
def test_arrays_go_through_the_device_and_back(gpu_calls, method):
    base, *experts = (tiny_llama(seed) for seed in range(3))
    merged = freemerge.merge_state_dicts(method, base, experts, device="interpreter")
    assert gpu_calls
    for name, array in freemerge.merge_state_dicts(method, base, experts).items():
        np.testing.assert_array_equal(merged[name], array)
    for expert in merged.experts:
        assert all(isinstance(rows.values, np.ndarray) for rows in expert.tensors.values())


@pytest.mark.parametrize("selection", ["row", "tensor", "model"])
@pytest.mark.parametrize("combine", ["add", "replace"])
def test_an_expert_is_cut_out_and_applied_where_the_tensors_lie(selection, combine):
    base, *experts = (tiny_llama(seed) for seed in range(3))
    parameters = {"selection": selection, "combine": combine, "relative_to": "base", "density": 0.1}
    merged = freemerge.merge_state_dicts(
        "free", tensors(base), list(map(tensors, experts)), device="interpreter", **parameters
    )
    expected = freemerge.merge_state_dicts("free", base, experts, **parameters)
    for mine, theirs in zip(merged.experts, expected.experts, strict=True):
        assert all(isinstance(rows.values, torch.Tensor) for rows in mine.tensors.values())
        assert mine.metadata == theirs.metadata
        # rows come along to wherever the state dict is
        for name, array in mine.apply(expected).items():
            np.testing.assert_array_equal(array, theirs.apply(expected)[name])


def test_integers_and_tied_tensors():
    base, expert = ({"a": torch.full((3,), value), "n": torch.tensor([1, 2])} for value in (1.0, 2.0))
    for state in (base, expert):
        state["b"] = state["a"]
    merged = freemerge.merge_state_dicts("task_arithmetic", base, [expert], device="interpreter", scaling=0.5)
    assert merged["a"].tolist() == merged["b"].tolist() == [1.5] * 3
    assert merged["a"].data_ptr() == merged["b"].data_ptr()
    assert merged["n"].tolist() == [1, 2]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["arrays", "tensors"])
def test_what_is_not_finite_is_named(kind):
    base, expert = ({"a": kind(np.ones(3, np.float32)), "b": kind(np.ones((2, 5), np.float32))} for _ in range(2))
    expert["b"][1, 2] = np.nan
    with pytest.raises(CheckpointError, match="b: NaN or Inf in math"):
        freemerge.merge_state_dicts("fr", base, {"math": expert}, device="interpreter")
    merged = freemerge.merge_state_dicts("average", base, {"math": expert}, device="interpreter", check_finite=False)
    assert np.isnan(np.asarray(merged["b"])).sum() == 1


def test_a_gpu_too_small_is_said_to_be(monkeypatch):
    def full(op):
        def run(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return run

    monkeypatch.setattr(dispatch, "gpu_version", full)
    state = {"w": torch.ones(3, 4)}
    with pytest.raises(UnavailableError, match=r"the GPU's memory ran out: .* device=.cuda., which streams"):
        freemerge.merge_state_dicts("average", state, [state, state], device="interpreter")


def test_inputs_that_lie_apart_are_listed():
    base = MemoryCheckpoint({"a": torch.ones(3), "b": torch.ones(3)}, "base", device=CPU)
    half = MemoryCheckpoint({"a": torch.ones(3), "b": np.ones(3, np.float32)}, "half", device=CPU)
    recipe = Recipe.from_flags("task_arithmetic", "base", {"half": "half"}, {})
    plan = make_plan(recipe, get("task_arithmetic"), base, [half], shard_size=None)
    with pytest.raises(PlanError) as error:
        check_together(plan)
    text = str(error.value)
    assert "inputs lie apart, b for one" in text
    assert "base: 2 tensors on cpu" in text
    assert "half: 1 tensors on cpu, 1 tensors on the host, as NumPy arrays" in text
    assert ".cpu() for all" in text


def test_placed_like():
    array = random_array((3, 4), np.float32, 0)
    array.flags.writeable = False
    assert placed_like(array, array) is array
    tensor = placed_like(array, torch.ones(1))
    np.testing.assert_array_equal(placed_like(tensor, array), array)
    assert placed_like(tensor, tensor) is tensor
