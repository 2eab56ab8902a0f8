"""Which device is chosen, and what is said where a GPU is asked for that cannot be used."""

import ctypes
import importlib.metadata
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import freemerge
from freemerge import cli, devices
from freemerge.accelerator import Accelerator, is_out_of_memory
from freemerge.checkpoint.torch_arrays import from_torch
from freemerge.devices import Driver
from freemerge.errors import InputError, RecipeError, UnavailableError
from freemerge.kernels.array import FLOATS
from freemerge.testing import random_array

GIB = 1 << 30


class FakeCuda:
    """torch.cuda of a machine with `names`; those in `full` let nobody in."""

    def __init__(self, names):
        self.names = names
        self.device_count = lambda: len(names)
        self.is_available = lambda: bool(names)
        self.get_device_name = lambda device: names[getattr(device, "index", device)]
        self.get_device_capability = lambda device: (9, 0)
        self.full = ()
        self.reserved, self.emptied = 0, 0
        self.memory_reserved = lambda device: self.reserved

    def empty_cache(self):
        self.reserved, self.emptied = 0, self.emptied + 1

    def mem_get_info(self, device):
        if getattr(device, "index", device) in self.full:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return 100 * GIB, 140 * GIB


@pytest.fixture
def machine(monkeypatch):
    """machine(...) makes this one look like it has a driver, torch, triton and cupy, or lacks one of them."""

    def make(*, driver=(13, 0), gpus=("NVIDIA H200", "NVIDIA H200"), cuda="13.0", sees=None, lacks=(), cupy=13):
        found = driver if isinstance(driver, str) else Driver(driver, len(gpus))
        monkeypatch.setattr(devices, "driver", lambda: found)
        monkeypatch.setattr(devices, "installed", lambda package: package not in lacks)
        monkeypatch.setattr(devices, "cupy_major", lambda: cupy)
        fake = SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda=cuda),
            cuda=FakeCuda(gpus if sees is None else sees),
            device=torch.device,
        )
        monkeypatch.setitem(sys.modules, "torch", fake)

    for variable in ("FREEMERGE_IMPL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    return make


TROUBLE = {
    "no driver": ({"driver": "no NVIDIA driver here"}, ["no NVIDIA driver here", "install"]),
    "no device": ({"gpus": ()}, ["shows no GPU", "nvidia-smi"]),
    "no torch": ({"lacks": ("torch",)}, ["torch is not installed", "pip install 'freemerge[gpu]'"]),
    "torch for the CPU": ({"cuda": None}, ["torch 2.13.0 is built without CUDA", "install torch's CUDA build"]),
    "old driver": ({"driver": (12, 4), "sees": ()}, ["driver serves CUDA 12.4", "needs CUDA 13", "update the driver"]),
    "broken torch": ({"sees": ()}, ["cannot use the GPU", "torch.cuda.init()"]),
    "no triton": ({"lacks": ("triton",)}, ["triton is not installed", "pip install 'freemerge[gpu]'"]),
    "no cupy": ({"lacks": ("cupy",)}, ["cupy is not installed", "pip install 'freemerge[gpu]'"]),
    "neither": ({"lacks": ("triton", "cupy")}, ["triton and cupy are not installed"]),
    "another cupy": ({"cupy": 12}, ["cupy is built for CUDA 12, torch for CUDA 13", "pip install cupy-cuda13x"]),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_gpu_that_cannot_be_used(machine, trouble, models, tmp_path):
    looks, said = TROUBLE[trouble]
    machine(**looks)
    assert devices.find("auto") == []
    with pytest.raises(UnavailableError) as error:
        freemerge.merge("task_arithmetic", *models, tmp_path / "out", device="cuda")
    message = str(error.value)
    assert message.startswith("device cuda: ")
    assert "\n" not in message
    for part in said:
        assert part in message
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_hidden_gpus_are_said_to_be(machine, monkeypatch, value):
    machine(gpus=() if value == "7" else ("NVIDIA H200",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert f"CUDA_VISIBLE_DEVICES={value} hides the GPUs" in devices.why_not()
    assert devices.find() == []


def test_an_implementation_asked_for_keeps_to_the_cpu(machine, monkeypatch):
    machine()
    monkeypatch.setenv("FREEMERGE_IMPL", "reference")
    assert devices.find("auto") == []
    with pytest.raises(UnavailableError, match="FREEMERGE_IMPL=reference"):
        devices.find("cuda")


def test_all_gpus_or_one(machine):
    machine(gpus=("NVIDIA H200", "NVIDIA A100"))
    assert [str(found) for found in devices.find("auto")] == ["cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA A100)"]
    assert [str(found) for found in devices.find("cuda")] == [str(found) for found in devices.find()]
    assert [str(found) for found in devices.find("cuda:1")] == ["cuda:1 (NVIDIA A100)"]
    assert devices.find("cpu") == []
    with pytest.raises(UnavailableError) as error:
        devices.find("cuda:2")
    assert str(error.value) == "device cuda:2: there is cuda:0 (NVIDIA H200), cuda:1 (NVIDIA A100)"


def test_a_gpu_that_lets_nobody_in_is_left_out_or_named(machine):
    machine()
    sys.modules["torch"].cuda.full = (1,)
    assert [str(found) for found in devices.find()] == ["cuda:0 (NVIDIA H200)"]
    with pytest.raises(UnavailableError) as error:
        devices.find("cuda")
    assert str(error.value) == (
        "device cuda: cuda:1 cannot be used (CUDA error: out of memory); `nvidia-smi` shows who uses it"
    )
    assert info()["cuda:1"] == "NVIDIA H200, cannot be used: CUDA error: out of memory"


def test_the_budget_is_a_share_of_what_is_free(machine):
    machine(gpus=("NVIDIA H200",))
    assert devices.find("cuda")[0].limit == 80 * GIB
    assert devices.find("cuda", 3 * GIB)[0].limit == 3 * GIB


def test_what_torch_keeps_beyond_the_budget_is_given_back(machine):
    machine()
    cuda = sys.modules["torch"].cuda
    cuda.reserved = 50 * GIB  # somebody else's in this process
    accelerator = devices.find("cuda:0", 10 * GIB)[0]
    for kept, emptied in ((60, 0), (61, 1), (60, 1)):
        cuda.reserved = kept * GIB
        with accelerator.reserve(GIB):
            pass
        assert cuda.emptied == emptied


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "", "mps"])
def test_a_device_that_does_not_exist(device):
    with pytest.raises(RecipeError, match="there are auto, cpu, cuda"):
        devices.find(device)


def test_the_interpreter_is_for_tests_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError):
        devices.find("interpreter")


def test_a_bad_budget(models, tmp_path):
    with pytest.raises(InputError, match="not a size"):
        freemerge.merge("fr", *models, tmp_path / "out", max_gpu_memory="much")


# -- the driver ---------------------------------------------------------------------------------------------------


class FakeLibrary:
    def __init__(self, status=0, version=13000, count=2):
        self.cuInit = lambda flags: status
        self.cuDriverGetVersion = lambda where: _put(where, version)
        self.cuDeviceGetCount = lambda where: _put(where, count)


def _put(where, value) -> int:
    where._obj.value = value
    return 0


def test_the_driver_is_asked_through_its_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(version=12040, count=3))
    assert devices.driver() == Driver((12, 4), 3)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(status=100))
    assert devices.driver().gpus == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(status=999))
    assert devices.driver() == "the NVIDIA driver does not start (CUDA error 999)"


def test_no_library_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "libcuda.so.1 is not found" in devices.driver()


@pytest.mark.parametrize(
    ("distribution", "major"), [("cupy-cuda13x", 13), ("cupy-cuda12x", 12), ("cupy", None), (None, None)]
)
def test_what_cupy_is_built_for_stands_in_its_name(monkeypatch, distribution, major):
    def version(name):
        if name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return "14.2.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert devices.cupy_major() == major


# -- freemerge info -----------------------------------------------------------------------------------------------


def info() -> dict:
    return json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).stdout)


def test_info_describes_every_gpu(machine):
    machine()
    told = info()
    assert told["device"] == "cuda:0, cuda:1"
    assert told["cuda:1"] == "NVIDIA H200, compute capability 9.0, 100 GiB free of 140 GiB"
    assert told["driver"] == "CUDA 13.0"


@pytest.mark.parametrize("trouble", TROUBLE)
def test_info_says_why_the_cpu_is_used(machine, trouble):
    looks, said = TROUBLE[trouble]
    machine(**looks)
    told = info()
    assert told["device"] == "cpu"
    for part in said:
        assert part in told["gpu"]


def test_info_says_what_the_gpu_versions_are_made_of(monkeypatch):
    tools = {row["op"]: row["gpu"] for row in info()["ops"]}
    assert set(tools.values()) <= {"triton", "cuda", "none"}
    assert tools["add_task_vectors"] == "triton"


def test_a_dry_run_names_the_devices(machine, models):
    machine()
    base, experts = models
    flags = ["--method", "fr", "--base", base, *(part for e in experts for part in ("--expert", e))]
    told = CliRunner().invoke(cli.app, ["merge", *flags, "--device", "cuda", "--dry-run"])
    assert told.exit_code == 0
    assert "cuda:0 (NVIDIA H200), cuda:1 (NVIDIA H200)" in told.stdout


# -- the way there and back ---------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def lane(request):
    accelerator = Accelerator(torch.device(request.param), "here", GIB, lanes=1)
    return accelerator.lane(4096)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2048,), (4099,), (33, 500)], ids=str)
def test_arrays_arrive_and_return(lane, dtype, shape):
    array = random_array(shape, dtype, 0)
    with lane.current():
        tensor = lane.upload(array)
        assert tuple(tensor.shape) == shape
        np.testing.assert_array_equal(from_torch(tensor.cpu()), array)
        back, position = np.empty(array.size, dtype), 0
        for first, part in lane.download(tensor):
            assert first == position
            assert part.nbytes <= 4096
            back[first : first + part.size] = part
            position += part.size
    assert position == array.size
    np.testing.assert_array_equal(back.reshape(shape), array)


def test_a_tensor_already_there_is_not_sent(lane):
    tensor = lane.empty((3,), np.dtype(np.float32))
    assert lane.upload(tensor) is tensor


def test_what_running_out_of_memory_looks_like():
    cupy_error = type("OutOfMemoryError", (MemoryError,), {})
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        cupy_error("Out of memory allocating 512 bytes"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory"),
    ):
        assert is_out_of_memory(error)
    for error in (MemoryError(), RuntimeError("CUDA error: unspecified launch failure"), ValueError("out of memory")):
        assert not is_out_of_memory(error)
