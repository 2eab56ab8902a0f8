import ml_dtypes
import numpy as np
import pytest
import torch

from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.errors import CheckpointError
from freemerge.testing import random_array

TORCH = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def test_arrays_are_shared_and_read_only():
    given = random_array((4, 6), ml_dtypes.bfloat16, 0)
    with MemoryCheckpoint({"b": given, "a": np.float32([1, 2])}, "mine") as checkpoint:
        read = checkpoint.read("b")
        assert np.shares_memory(read, given)
        assert not read.flags.writeable
        assert given.flags.writeable
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["b"].nbytes == 48


@pytest.mark.parametrize("dtype", TORCH, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (), (0, 3)])
def test_torch_tensors_go_through_without_a_copy(dtype, shape):
    given = (
        torch.arange(24.0).reshape(4, 6).to(dtype)[tuple(slice(n) for n in shape)]
        if shape
        else torch.tensor(1.0).to(dtype)
    )
    checkpoint = MemoryCheckpoint({"w": given}, "mine")
    read = checkpoint.read("w")
    assert read.shape == shape
    assert read.astype(np.float64).tolist() == given.double().tolist()
    back = checkpoint.like_input("w", read.copy())
    assert back.dtype == dtype
    assert torch.equal(back.double(), given.double())
    if given.numel():
        assert read.__array_interface__["data"][0] == given.data_ptr()


def test_a_transposed_tensor_is_copied_into_order():
    given = torch.arange(24.0).reshape(4, 6)
    checkpoint = MemoryCheckpoint({"t": given.T, "n": given.numpy()[:, ::2]}, "mine")
    for name, expected in {"t": given.numpy().T, "n": given.numpy()[:, ::2]}.items():
        assert checkpoint.read(name).flags.c_contiguous
        np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_parameters_lose_their_gradient_not_their_memory():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert MemoryCheckpoint({"p": parameter}, "mine").read("p").__array_interface__["data"][0] == parameter.data_ptr()


@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_shared_memory_is_tied(make):
    embedding, other = make((5, 4)), make((5, 4))
    state = {
        "embed": embedding,
        "other": other,
        "head": embedding[:],
        "part": embedding[:2],
        "flat": embedding.reshape(4, 5),
    }
    assert MemoryCheckpoint(state, "mine").tied == {"head": "embed"}


def test_empty_tensors_are_not_tied():
    assert MemoryCheckpoint({"a": torch.ones(0), "b": torch.ones(0)}, "mine").tied == {}


def test_numpy_in_numpy_out():
    array = np.ones(3)
    assert MemoryCheckpoint({"a": array}, "mine").like_input("a", array) is array


def test_all_unfit_values_are_named():
    state = {
        "good": np.ones(2),
        "c": np.ones(2, complex),
        "q": [1.0],
        "s": torch.eye(2).to_sparse(),
        "z": torch.ones(1, dtype=torch.cfloat),
    }
    state["swapped"] = np.ones(2, ">f4")
    state["meta"] = torch.ones(1, device="meta")
    with pytest.raises(CheckpointError) as caught:
        MemoryCheckpoint(state, "mine")
    for name in ("c", "q", "s", "z", "swapped", "meta"):
        assert f"mine: {name}: " in str(caught.value)
    assert "good" not in str(caught.value)


def test_fingerprint_sees_values_names_and_shapes():
    array = random_array((40, 50), np.float32, 0)
    changed = array.copy()
    changed[-1, -1] += 1
    states = [{"a": array}, {"b": array}, {"a": array.reshape(50, 40)}, {"a": changed}, {"a": array.view(np.int32)}]
    hashes = {MemoryCheckpoint(state, "mine").fingerprint()["mine"]["xxh3_128"] for state in states}
    assert len(hashes) == len(states)
    assert MemoryCheckpoint({"a": array.copy()}, "x").fingerprint()["x"]["xxh3_128"] in hashes
