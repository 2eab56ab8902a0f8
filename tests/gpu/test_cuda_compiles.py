"""Every kernel of csrc/cuda compiles without spilling. `pytest -s` shows what the kernels need."""

import re
from pathlib import Path

import pytest
from emulator import kernels_of

pytest.importorskip("cupy_backends")
from cupy_backends.cuda.libs import nvrtc

from freemerge.errors import UnavailableError
from freemerge.kernels.cuda._compile import compile_source, sources
from freemerge.kernels.cuda._transform import transform

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = [f"sm_{known}" for known in (80, 90, 100) if known in nvrtc.getSupportedArchs()]
LENGTHS = (768, 4096, 11008, 14336)
STORAGE = {"BASE": "BF16", "EXPERT": "BF16", "OUT": "BF16"}

# What each source is compiled with.
DEFINES = {
    "high_pass_sweeps.cu": [transform(n).defines | STORAGE for n in LENGTHS],
    "high_pass_across.cu": [transform(n).defines for n in LENGTHS],
    "high_pass_transpose.cu": [STORAGE],
    "high_pass_gain.cu": [{}],
}
# The limits of registers fit sm_80 and sm_90; for sm_100 the compiler schedules further ahead and lacks a few.
MAY_USE_THE_STACK = {
    ("high_pass_sweep_in", 768, "sm_100"),
    ("high_pass_sweep_in", 4096, "sm_100"),
    ("high_pass_sweep_in", 14336, "sm_100"),
    ("high_pass_sweep_out", 768, "sm_100"),
    ("high_pass_sweep_out", 4096, "sm_100"),
    ("high_pass_across", 768, "sm_100"),
    ("high_pass_across", 4096, "sm_100"),
    ("high_pass_across", 14336, "sm_100"),
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
        _, log = compile_source(source, defines[0], ARCHITECTURES[0])
        assert set(resources(log)) == set(kernels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", DEFINES)
def test_no_kernel_spills(source, architecture):
    for defines in DEFINES[source]:
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
