"""CUDA C++ of csrc/cuda as kernels: compiled by NVRTC at first use, kept on disk, launched on torch's current stream.

NVRTC is called directly rather than through cupy.RawModule, which flushes denormal numbers to zero.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.errors import UnavailableError

OPTIONS = (
    "--std=c++17",
    "--fmad=false",  # as on the CPU: code that wants a fused multiply-add says so
    "--device-as-default-execution-space",  # headers shared with the CPU
    "-DFREEMERGE_CUDA",
    "-DFREEMERGE_ISA=device",
)
AT_MOST_WITHOUT_ASKING = 48 << 10  # bytes of dynamic shared memory


class Kernel:
    """A kernel on one device."""

    def __init__(self, function, device: int):
        self._function, self._device, self._shared_memory = function, device, AT_MOST_WITHOUT_ASKING

    def launch(self, grid: tuple[int, ...], block: int, arguments: Sequence[Any], shared_memory: int) -> None:
        """Start `grid` blocks of `block` threads with so many bytes of dynamic shared memory on torch's current stream.

        Args:
            arguments: tensors (passed as their address), None (a null pointer) and NumPy numbers of the C++ type.
        """
        import cupy
        import torch

        if shared_memory > self._shared_memory:
            self._function.max_dynamic_shared_size_bytes = self._shared_memory = shared_memory
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with cupy.cuda.Device(self._device), cupy.cuda.ExternalStream(stream):
            self._function(grid, (block,), tuple(map(as_number, arguments)), shared_mem=shared_memory)


def as_number(argument: Any) -> np.generic:
    """What a kernel is passed for an argument: the number itself, for a tensor its address."""
    if argument is None:
        return np.uint64(0)
    return argument if isinstance(argument, np.generic) else np.uint64(argument.data_ptr())


def load(source: str, name: str, defines: Mapping[str, object]) -> Kernel:
    """The kernel `name` of csrc/cuda/`source`, compiled with `defines` for torch's current device.

    Raises:
        UnavailableError: CuPy is missing or cannot compile or load the kernel here; the message says what to do.
    """
    import torch

    device = torch.cuda.current_device()
    return _kernel(source, name, tuple(sorted((key, str(value)) for key, value in defines.items())), device)


@cache
def _kernel(source: str, name: str, defines: tuple[tuple[str, str], ...], device: int) -> Kernel:
    return Kernel(_module(source, defines, device).get_function(name), device)


@cache
def _module(source: str, defines: tuple[tuple[str, str], ...], device: int):
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    try:
        import cupy
    except ImportError as error:
        raise UnavailableError(f"{source} needs CuPy to compile ({error}); pip install 'freemerge[gpu]'") from error
    path = _cached(source, dict(defines), f"sm_{major}{minor}")
    try:
        module = cupy.RawModule(path=str(path))
        with cupy.cuda.Device(device):
            module.compile()
    except Exception as error:  # CUDADriverError, CUDARuntimeError, or what a mismatch of versions makes of them
        raise UnavailableError(
            f"the driver does not load {source} as compiled for sm_{major}{minor} ({_first_lines(error)}); update the "
            "driver, or install the CuPy for its CUDA version (cupy-cuda12x or cupy-cuda13x)"
        ) from error
    return module


def _cached(source: str, defines: Mapping[str, str], architecture: str) -> Path:
    """The compiled code as a file, which serves later processes."""
    from cupy_backends.cuda.libs import nvrtc

    try:
        version = nvrtc.getVersion()
    except Exception as error:
        raise UnavailableError(
            f"NVRTC, which compiles {source}, does not load ({_first_lines(error)}); pip install "
            "'cupy-cuda13x[ctk]', or the CuPy for this machine's CUDA version"
        ) from error
    key = repr((sources(), source, sorted(defines.items()), architecture, OPTIONS, version))
    path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if not path.exists():
        code, _ = compile_source(source, defines, architecture)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)  # whole or not at all, whoever else compiles it now
    return path


def _folder() -> Path:
    """$FREEMERGE_KERNEL_CACHE, or the user's cache directory; a new temporary one where that cannot be written."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("FREEMERGE_KERNEL_CACHE") or cache_home / "freemerge" / "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="freemerge-kernels-"))


def compile_source(source: str, defines: Mapping[str, object], architecture: str) -> tuple[bytes, str]:
    """(code, log) of csrc/cuda/`source` for an architecture such as "sm_90"; needs no GPU.

    The log lists registers, shared memory, stack and spills of each kernel.

    Raises:
        UnavailableError: NVRTC does not know the architecture or does not compile the source.
    """
    from cupy_backends.cuda.libs import nvrtc

    texts = dict(sources())
    contents = tuple(text.encode() for text in texts.values())
    names = tuple(path.removeprefix("include/").removeprefix("cuda/").encode() for path in texts)
    program = nvrtc.createProgram(texts[f"cuda/{source}"], source, contents, names)
    options = [*OPTIONS, f"-arch={architecture}", "--ptxas-options=-v", *(f"-D{k}={v}" for k, v in defines.items())]
    try:
        nvrtc.compileProgram(program, tuple(options))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        what = _first_lines(nvrtc.getProgramLog(program)) or str(error)
        raise UnavailableError(
            f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} does not compile {source} for {architecture} ({what}); "
            "install a newer CuPy (pip install -U 'freemerge[gpu]'), or pass NumPy arrays"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def sources() -> tuple[tuple[str, str], ...]:
    """(path, text) of every file of csrc/cuda and every header it may include; read from a zip as well."""
    root = resources.files("freemerge.csrc")
    folders = {"cuda": (".cu", ".h"), "include/freemerge": (".h",)}
    return tuple(
        (f"{folder}/{file.name}", file.read_text("utf-8"))
        for folder, ends in folders.items()
        for file in sorted(root.joinpath(folder).iterdir(), key=lambda file: file.name)
        if file.name.endswith(ends)
    )


def _first_lines(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return "; ".join(lines[:3])
