"""Sessions on a GPU, or in Triton's interpreter: the bytes of a merge on the CPU, in new tensors and old ones."""

import numpy as np
import pytest
import torch

import freemerge
from freemerge.errors import CheckpointError
from freemerge.kernels.array import BFLOAT16, is_float
from freemerge.testing import from_gpu, tiny_llama, to_gpu

DEVICE = "cuda:0" if torch.cuda.is_available() else "interpreter"
MERGES = [
    ("average", {}),
    ("linear", {"weight": [0.2, 0.5]}),
    ("task_arithmetic", {"weight": [0.3, 0.7], "dtype": "float32"}),
    ("task_arithmetic", {"scaling": 0.3}),
    ("ties_merging", {"density": 0.3}),
    ("dare_ties_merging", {"density": 0.5}),
    ("pcb", {}),
]


@pytest.fixture(scope="module")
def arrays():
    overrides = {"num_hidden_layers": 1, "vocab_size": 40}
    base, *experts = (tiny_llama(seed, dtype=BFLOAT16, **overrides) for seed in range(3))
    for model in (base, *experts):
        model["steps"] = np.arange(5)
    return base, experts


@pytest.fixture(scope="module")
def session(arrays):
    with freemerge.Session(*arrays, device=DEVICE) as session:
        yield session


@pytest.mark.parametrize(("method", "parameters"), MERGES)
def test_gives_the_bytes_of_the_cpu(session, arrays, method, parameters):
    merged = session.merge(method, **parameters)
    for name, expected in freemerge.merge_state_dicts(method, *arrays, **parameters).items():
        assert str(merged[name].device) == DEVICE.replace("interpreter", "cpu")
        assert np.array_equal(from_gpu(merged[name]), expected), name


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_into_what_is_there(session, arrays, where):
    into = {name: to_gpu(np.zeros_like(array)) for name, array in arrays[0].items()}
    into = {name: tensor.cpu() if where == "cpu" else tensor for name, tensor in into.items()}
    versions = {name: (tensor.data_ptr(), tensor._version) for name, tensor in into.items()}
    for scaling in (0.1, 0.6):
        session.merge("task_arithmetic", scaling=scaling, into=into)
    for name, expected in freemerge.merge_state_dicts("task_arithmetic", *arrays, scaling=0.6).items():
        assert np.array_equal(from_gpu(into[name]), expected), name
        assert into[name].data_ptr() == versions[name][0]
        assert into[name]._version > versions[name][1]


def test_names_what_is_not_finite(session, arrays):
    narrow = {name: a.astype(np.float16) if is_float(a.dtype) else a for name, a in arrays[0].items()}
    into = {name: to_gpu(array) for name, array in narrow.items()}
    with pytest.raises(CheckpointError) as error:
        session.merge("task_arithmetic", scaling=[{"filter": "mlp", "value": 1e8}, {"value": 0.1}], into=into)
    broken = [name for name, tensor in into.items() if not np.isfinite(from_gpu(tensor).astype(np.float64)).all()]
    assert broken == [name for name in into if "mlp" in name]
    assert str(error.value).count("does not fit float16") == len(broken)
    assert all(f"{name}: the result does not fit" in str(error.value) for name in broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_queues_its_work_without_waiting_and_leaves_no_memory_behind(arrays):
    before = torch.cuda.memory_allocated()
    with freemerge.Session(*arrays, device=DEVICE) as session:
        merged = session.merge("task_arithmetic", scaling=0.3)
        held = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for scaling in (0.1, 0.2):
                session.merge("task_arithmetic", scaling=scaling, into=merged, check_finite=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == held
    del merged
    assert torch.cuda.memory_allocated() == before
