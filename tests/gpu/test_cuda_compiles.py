"""Every kernel of csrc/cuda compiles without spilling. `pytest -s` shows what the kernels need."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator import kernels_of

pytest.importorskip("cupy_backends")
from cupy_backends.cuda.libs import nvrtc

from freemerge.errors import UnavailableError
from freemerge.kernels.cuda import _compile
from freemerge.kernels.cuda._compile import compile_source, sources
from freemerge.kernels.cuda._transform import transform

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = [f"sm_{known}" for known in (80, 90, 100) if known in nvrtc.getSupportedArchs()]
LENGTHS = {"sm_80": (768, 4096, 11008, 14336), "sm_90": (768, 4096, 11008, 14336), "sm_100": (4096,)}
STORAGE = {"BASE": "BF16", "EXPERT": "BF16", "OUT": "BF16"}

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # bytes a block may have


def transforms(architecture: str) -> list[dict]:
    return [transform(n, SHARED_MEMORY[architecture]).defines for n in LENGTHS[architecture]]


# What each source is compiled with for an architecture.
DEFINES = {
    "high_pass_sweeps.cu": lambda architecture: [defines | STORAGE for defines in transforms(architecture)],
    "high_pass_across.cu": transforms,
    "high_pass_transpose.cu": lambda _: [STORAGE],
    "high_pass_gain.cu": lambda _: [{}],
    "count_range.cu": lambda _: [STORAGE, STORAGE | {"BASE": "F64", "EXPERT": "F64"}],
}
# The limits of registers fit sm_80 and sm_90; for sm_100 the compiler schedules further ahead and lacks a few.
MAY_USE_THE_STACK = {
    ("high_pass_sweep_in", 4096, "sm_100"),
    ("high_pass_sweep_out", 4096, "sm_100"),
    ("high_pass_sweep_magnitudes", 4096, "sm_100"),
    ("high_pass_across", 4096, "sm_100"),
}


def resources(log: str) -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", part).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = (int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
        found[part.partition("'")[0]] = dict(zip(("registers", "shared", "stack", "spills"), numbers, strict=True))
    return found


def test_every_source_and_kernel_is_compiled_here():
    assert set(DEFINES) == {path.name for path in CSRC.glob("*.cu")}
    for source, defines in DEFINES.items():
        text = (CSRC / source).read_text("utf-8")
        kernels = kernels_of(text)
        assert len(kernels) == text.count("__global__")
        _, log = compile_source(source, defines("sm_90")[0], "sm_90")
        assert set(resources(log)) == set(kernels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", DEFINES)
def test_no_kernel_spills(source, architecture):
    for defines in DEFINES[source](architecture):
        code, log = compile_source(source, defines, architecture)
        assert code[:4] == b"\x7fELF"
        assert "warning" not in log
        n = defines.get("N", 0)
        for kernel, used in resources(log).items():
            print(f"\n{kernel:28} {architecture:6} N {n:6} {used}", end="")
            assert (used["stack"] == used["spills"] == 0) or (kernel, n, architecture) in MAY_USE_THE_STACK


def test_headers_travel_with_the_package():
    assert {"cuda/transform.h", "include/freemerge/butterfly.h", "include/freemerge/gain.h"} <= set(dict(sources()))


def test_what_does_not_compile_is_said_in_one_sentence():
    with pytest.raises(UnavailableError, match=r"does not compile high_pass_gain.cu for sm_90 \(.*COLUMNS") as caught:
        compile_source("high_pass_gain.cu", {"float2": "COLUMNS"}, "sm_90")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnavailableError, match="sm_1"):
        compile_source("high_pass_gain.cu", {}, "sm_1")


# ---- from source to kernel, as far as that goes without a GPU ----


def test_code_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FREEMERGE_KERNEL_CACHE", str(tmp_path / "kernels"))
    first = _compile._cached("high_pass_gain.cu", {}, "sm_90")
    monkeypatch.setattr(_compile, "compile_source", None)
    assert _compile._cached("high_pass_gain.cu", {}, "sm_90") == first
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [first.name]
    with pytest.raises(TypeError):  # other defines: other code
        _compile._cached("high_pass_gain.cu", {"N": "3"}, "sm_90")


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FREEMERGE_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    assert _compile._cached("high_pass_gain.cu", {}, "sm_90").stat().st_size > 0


class Refusing:
    """In the place of CuPy on a machine whose driver is too old."""

    class RawModule:
        def __init__(self, path):
            raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: unsupported toolchain")


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, "high_pass_gain.cu needs CuPy to compile .*; pip install 'freemerge\\[gpu\\]'"),
        (Refusing, "the driver does not load high_pass_gain.cu .*unsupported toolchain.*; update the driver"),
    ],
    ids=["no CuPy", "old driver"],
)
def test_what_is_missing_is_said_with_its_remedy(monkeypatch, tmp_path, cupy, message):
    monkeypatch.setenv("FREEMERGE_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(UnavailableError, match=message):
        _compile._module.__wrapped__("high_pass_gain.cu", (), 0)


def test_arguments_are_numbers_and_addresses():
    tensor = torch.zeros(3)
    assert _compile.as_number(tensor) == tensor.data_ptr()
    assert _compile.as_number(None) == 0
    assert _compile.as_number(tensor).itemsize == _compile.as_number(None).itemsize == 8


def test_a_kernel_is_launched_on_torchs_stream(monkeypatch):
    calls, entered = [], []

    class Entered:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            entered.append(self.number)

        def __exit__(self, *_):
            pass

    class Function:
        max_dynamic_shared_size_bytes = 48 << 10

        def __call__(self, grid, block, arguments, shared_mem):
            calls.append((grid, block, arguments, shared_mem, self.max_dynamic_shared_size_bytes))

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=Entered, ExternalStream=Entered))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    kernel = _compile.Kernel(Function(), 3)
    for shared in (1000, 100_000, 2000):
        kernel.launch((5, 2), 64, (None,), shared)
    assert entered == [3, 103] * 3
    assert calls == [
        ((5, 2), (64,), (0,), shared, most) for shared, most in ((1000, 48 << 10), (100_000, 100_000), (2000, 100_000))
    ]
