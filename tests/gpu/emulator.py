"""Kernels of csrc/cuda on CPU tensors: the same files through g++ (emulator.h), threads as fibers (emulator.cpp)."""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from freemerge.kernels.cuda import _compile

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O0", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
DEFINES = ["-DFREEMERGE_CUDA", "-DFREEMERGE_EMULATED", "-DFREEMERGE_ISA=device"]

descending = False  # the order of blocks and threads


class Kernel:
    """In the place of `_compile.Kernel`."""

    def __init__(self, library, name: str):
        self._library, self._call = library, getattr(library, f"emulated_{name}")

    def launch(self, grid, block, arguments, shared_memory):
        held = [np.array(_compile.as_number(argument)) for argument in arguments]
        addresses = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
        x, y = (*grid, 1)[:2]
        run = self._library.emulator_run
        run.restype = ctypes.c_char_p
        fault = run(self._call, addresses, x, y, block, ctypes.c_size_t(shared_memory), int(descending))
        assert fault is None, fault.decode()


def load(source: str, name: str, defines) -> Kernel:
    """In the place of `_compile.load`."""
    return Kernel(_library(source, tuple(sorted((key, str(value)) for key, value in defines.items()))), name)


@cache
def _library(source: str, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    text = (CSRC / "cuda" / source).read_text("utf-8")
    names = kernels_of(text)
    program = f'#include "emulator.h"\n#include "{source}"\n' + "".join(f"EMULATED({name})\n" for name in names)
    stem = _folder() / hashlib.sha256(repr((source, defines)).encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(program)
    include = [f"-I{folder}" for folder in (HERE, CSRC / "cuda", CSRC / "include")]
    macros = [*DEFINES, *(f"-D{key}={value}" for key, value in defines)]
    _run(["g++", "-shared", *FLAGS, *include, *macros, f"{stem}.cpp", str(_machinery()), "-o", f"{stem}.so"])
    return ctypes.CDLL(f"{stem}.so")


@cache
def _machinery() -> Path:
    target = _folder() / "emulator.o"
    _run(["g++", "-c", *FLAGS, "-O2", str(HERE / "emulator.cpp"), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@cache
def _folder() -> Path:
    global _kept  # removed with the process
    _kept = tempfile.TemporaryDirectory(prefix="freemerge-emulator-")
    return Path(_kept.name)


def kernels_of(text: str) -> list[str]:
    """The names of the kernels a source defines."""
    return re.findall(r'extern "C" __global__ void __launch_bounds__\([^()]*(?:\([^()]*\)[^()]*)*\)\s+(\w+)\(', text)
