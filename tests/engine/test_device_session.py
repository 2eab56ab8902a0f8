"""Sessions on a device: inputs stay there, or are streamed where they do not fit. Stand-ins play the kernels' part."""

import numpy as np
import pytest
import torch

import freemerge
from freemerge import resident, stream
from freemerge.checkpoint.torch_arrays import from_torch, to_torch
from freemerge.errors import CheckpointError, UnavailableError
from freemerge.inputs import Inputs
from freemerge.kernels import dispatch
from freemerge.testing import tiny_llama, write_checkpoint


@pytest.fixture(autouse=True)
def stand_ins(gpu_calls, monkeypatch):
    monkeypatch.setattr(dispatch, "_cpu", None)  # the references on the CPU too: the same bytes


@pytest.fixture
def arrays():
    base, *experts = (tiny_llama(seed) for seed in range(3))
    return base, experts


@pytest.fixture(params=[None, 20_000], ids=["resident", "streamed"])
def session(request, arrays):
    with freemerge.Session(*arrays, device="interpreter", max_gpu_memory=request.param) as session:
        yield session


MERGES = [
    ("average", {}),
    ("linear", {"weight": [0.2, 0.8]}),
    ("task_arithmetic", {"weight": [0.5, 0.1]}),
    ("fr", {"scaling": 0.5}),
    ("free", {"density": 0.05}),
]


def test_equals_merge_state_dicts(session, arrays, gpu_calls):
    for method, parameters in MERGES:
        gpu_calls.clear()
        merged = session.merge(method, **parameters)
        assert gpu_calls
        expected = freemerge.merge_state_dicts(method, *arrays, **parameters)
        for name, tensor in merged.items():
            assert torch.is_tensor(tensor)
            assert np.array_equal(from_torch(tensor), expected[name]), (method, name)
        assert [expert.name for expert in merged.experts] == [expert.name for expert in expected.experts]
        for expert, other in zip(merged.experts, expected.experts, strict=True):
            assert expert.metadata == other.metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_into_tensors_on_the_device_and_others(session, arrays, dtype):
    into = {name: torch.zeros(array.shape, dtype=dtype) for name, array in arrays[0].items()}
    into["lm_head.weight"] = torch.zeros(48, 160, dtype=dtype).t()
    into["model.norm.weight"] = np.zeros(48)
    session.merge("task_arithmetic", scaling=0.4, into=into)
    name = str(dtype).removeprefix("torch.")
    expected = freemerge.merge_state_dicts("task_arithmetic", *arrays, scaling=0.4, dtype=name)
    in_double = freemerge.merge_state_dicts("task_arithmetic", *arrays, scaling=0.4, dtype="float64")
    assert np.array_equal(into.pop("model.norm.weight"), in_double["model.norm.weight"])
    for name, tensor in into.items():
        assert np.array_equal(from_torch(tensor), expected[name]), name


def test_inputs_are_copied_once(arrays, gpu_calls):
    model = {name: to_torch(array.copy()) for name, array in arrays[0].items()}
    with freemerge.Session(model, arrays[1], device="interpreter") as session:
        expected = session.merge("task_arithmetic", scaling=0.5)
        session.merge("task_arithmetic", scaling=0.5, into=model)  # the session has a copy of its own
        again = session.merge("task_arithmetic", scaling=0.5)
    for name, tensor in expected.items():
        assert torch.equal(model[name], tensor)
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_named(arrays, broken):
    base, experts = arrays
    experts[1]["model.norm.weight"][3] = broken
    with freemerge.Session(base, experts, device="interpreter") as session:
        with pytest.raises(CheckpointError, match=r"1 problem, nothing was written\n  model.norm.weight: .* expert1\n"):
            session.merge("average")
        with pytest.raises(CheckpointError, match="`into` holds a result that is not finite"):
            session.merge("average", into={name: torch.zeros(array.shape) for name, array in base.items()})
        assert torch.isnan(session.merge("average", check_finite=False)["model.norm.weight"][3]) == np.isnan(broken)


def test_streams_only_what_does_not_fit(arrays, monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(stream.Stream, "run", lambda self: runs.append(self))
    paths = [write_checkpoint(tmp_path / str(t), model) for t, model in enumerate((arrays[0], *arrays[1]))]
    nbytes = sum(array.nbytes for array in arrays[0].values())
    for limit, streams in ((5 * nbytes, False), (3 * nbytes, True)):
        with freemerge.Session(paths[0], paths[1:], device="interpreter", max_gpu_memory=limit) as session:
            session.merge("average")
        assert bool(runs) == streams


def test_a_gpu_that_is_fuller_than_it_seemed_streams(arrays, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "move_to", full)
        session = freemerge.Session(*arrays, device="interpreter")
    merged = session.merge("average")
    expected = freemerge.merge_state_dicts("average", *arrays)
    assert all(np.array_equal(from_torch(merged[name]), expected[name]) for name in expected)

    with freemerge.Session(*arrays, device="interpreter") as session:
        monkeypatch.setattr(resident, "run", full)
        with pytest.raises(UnavailableError, match=r"memory is full(.|\n)*into="):
            session.merge("average")
