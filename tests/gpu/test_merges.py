"""Whole merges with the real kernels: from files through the device, and of tensors that lie there."""

import numpy as np
import pytest
import torch

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.torch_arrays import from_torch
from freemerge.checkpoint.verify import verify
from freemerge.experts.sidecar import read_expert
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, to_gpu, write_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "interpreter"
SMALL = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "vocab_size": 70}


FEW = ("self_attn.k_proj.weight", "mlp.up_proj.weight", "model.norm.weight")  # interpreted, selection takes its time


def state_dicts(only=("",)):
    """A base and two experts near it; of the tensors with one of `only` at the end of their names."""
    base = {name: array for name, array in tiny_llama(0, dtype=BFLOAT16, **SMALL).items() if name.endswith(only)}
    moves = [
        [random_array(array.shape, np.float32, 1000 * t + i, 0.004) for i, array in enumerate(base.values())]
        for t in (1, 2)
    ]
    experts = [
        {
            name: (array.astype(np.float32) + step).astype(BFLOAT16)
            for (name, array), step in zip(base.items(), steps, strict=True)
        }
        for steps in moves
    ]
    return base, experts


def written(folder, base, experts):
    config = tiny_llama_config(**SMALL)
    return [write_checkpoint(folder / str(i), tensors, config=config) for i, tensors in enumerate([base, *experts])]


def read(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def ordered(array):
    """bfloat16 as integers in the order of the numbers: neighbours differ by one."""
    bits = array.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_agree(merged, expected, ulps):
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        assert np.abs(ordered(array) - ordered(expected[name])).max(initial=0) <= ulps, name


# method, parameters -> ulps of bfloat16 that CPU and GPU may be apart: the filter rounds in another order
METHODS = {
    "average": ("average", {}, 0),
    "linear": ("linear", {"weight": 0.4}, 0),
    "task_arithmetic": ("task_arithmetic", {"scaling": 0.5}, 0),
    "fr": ("fr", {}, 1),
    "fr, aligned": ("fr", {"align": True}, 1),
    "fr, elected": ("fr", {"elect": True, "normalize": True}, 1),
}


@pytest.mark.parametrize(("method", "parameters", "ulps"), METHODS.values(), ids=METHODS)
def test_files_through_the_device(tmp_path, method, parameters, ulps):
    base, experts = state_dicts()
    folders = written(tmp_path, base, experts)
    freemerge.merge(method, folders[0], folders[1:], tmp_path / "out", device=DEVICE, **parameters)
    assert not verify(tmp_path / "out").problems
    assert_agree(read(tmp_path / "out"), freemerge.merge_state_dicts(method, base, experts, **parameters), ulps)


@pytest.mark.parametrize(("method", "parameters", "ulps"), METHODS.values(), ids=METHODS)
def test_tensors_on_the_device(method, parameters, ulps):
    base, experts = state_dicts()
    there = [{name: to_gpu(array) for name, array in tensors.items()} for tensors in (base, *experts)]
    merged = freemerge.merge_state_dicts(method, there[0], there[1:], device=DEVICE, **parameters)
    assert {tensor.device for tensor in merged.values()} == {tensor.device for tensor in there[0].values()}
    assert_agree(
        {name: from_torch(tensor.cpu()) for name, tensor in merged.items()},
        freemerge.merge_state_dicts(method, base, experts, **parameters),
        ulps,
    )


@pytest.mark.parametrize("selection", ["tensor", "model"])
def test_experts_cut_out_on_the_device(tmp_path, selection):
    base, experts = state_dicts(FEW)
    folders = written(tmp_path, base, experts)
    parameters = {"density": 0.05, "selection": selection}
    freemerge.merge("free", folders[0], folders[1:], tmp_path / "out", device=DEVICE, **parameters)
    assert not verify(tmp_path / "out").problems
    expected = freemerge.merge_state_dicts("free", base, experts, **parameters)
    assert_agree(read(tmp_path / "out"), expected, 1)
    for name, from_memory in zip(("1", "2"), expected.experts, strict=True):
        from_file = read_expert(tmp_path / "out" / "experts" / f"{name}.safetensors")
        assert from_file.tensors.keys() == from_memory.tensors.keys()
        # an ulp of the backbone may change which of two entries is kept, and its value by as much
        for tensor, rows in from_memory.tensors.items():
            there = from_file.tensors[tensor]
            assert abs(there.count - rows.count) <= (8 if selection == "model" else 0)
            assert there.sum_abs() * from_file.scale(tensor) == pytest.approx(
                rows.sum_abs() * from_memory.scale(tensor), rel=0.02
            )


def test_experts_are_applied_on_the_device():
    base, experts = state_dicts(FEW)
    there = [{name: to_gpu(array) for name, array in tensors.items()} for tensors in (base, *experts)]
    parameters = {"density": 0.05, "relative_to": "base"}
    merged = freemerge.merge_state_dicts("free", there[0], there[1:], device=DEVICE, **parameters)
    expected = freemerge.merge_state_dicts("free", base, experts, **parameters)
    for mine, theirs in zip(merged.experts, expected.experts, strict=True):
        for name, rows in theirs.tensors.items():
            np.testing.assert_array_equal(mine.tensors[name].on_host().to_dense(), rows.to_dense())
        # the rows come to wherever the state dict lies
        assert_agree(mine.apply(expected), theirs.apply(expected), 0)


@pytest.mark.parametrize("through", ["files", "tensors"])
def test_masks_are_cut_out_and_applied_on_the_device(tmp_path, through):
    base, experts = state_dicts(FEW)
    expected = freemerge.merge_state_dicts("emr", base, experts)
    if through == "files":
        folders = written(tmp_path, base, experts)
        freemerge.merge("emr", folders[0], folders[1:], tmp_path / "out", device=DEVICE)
        assert not verify(tmp_path / "out").problems
        assert_agree(read(tmp_path / "out"), expected, 0)
        found = [read_expert(tmp_path / "out" / "experts" / f"{name}.safetensors") for name in ("1", "2")]
    else:
        there = [{name: to_gpu(array) for name, array in tensors.items()} for tensors in (base, *experts)]
        merged = freemerge.merge_state_dicts("emr", there[0], there[1:], device=DEVICE)
        found = merged.experts
    for mine, theirs in zip(found, expected.experts, strict=True):
        for name, part in theirs.tensors.items():
            there = mine.tensors[name]
            np.testing.assert_array_equal(from_array(there.mask), part.mask)
            assert_agree({name: from_array(there.vector)}, {name: part.vector}, 0)
            assert mine.scale(name) == pytest.approx(theirs.scale(name), rel=1e-12)
    if through == "tensors":  # a factor made of float64 sums may have another last bit in float32
        applied = {name: from_array(tensor) for name, tensor in found[0].apply(merged).items()}
        assert_agree(applied, expected.experts[0].apply(expected), 1)


def from_array(array):
    return from_torch(array.cpu()) if isinstance(array, torch.Tensor) else array
