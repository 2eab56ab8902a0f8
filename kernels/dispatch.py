"""Which version of an op runs here: a look-up by name that tells the truth."""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from functools import cache

from freemerge.errors import UnavailableError
from freemerge.kernels.array import Array, is_tensor

try:
    from freemerge.kernels import _cpu
except (
    ImportError
) as error:  # an installation without its compiled module: everything works, slowly; `freemerge info` says why
    _cpu, missing = None, str(error)
else:
    missing = None

GPU_FOLDERS = ("triton", "cuda")  # an op lies in one of them
_alone = threading.RLock()  # Triton's interpreter patches modules while it runs: not for two threads
_compiled: set[tuple] = set()  # what has run once, alone, so that threads do not all compile the same kernel


def implementation(op: str, array: Array) -> Callable | None:
    """The fastest version of `op` for arrays like this one, or None where the op has to run its reference.

    A NumPy array (or None) has the compiled version or the reference; FREEMERGE_IMPL=reference asks for the latter,
    FREEMERGE_IMPL=cpu for the compiled version or an error. A CUDA tensor has the GPU version of the op.

    Raises:
        UnavailableError: what is asked for, or what the array needs, is not here.
    """
    wish = os.environ.get("FREEMERGE_IMPL", "auto")
    if wish not in ("auto", "cpu", "reference"):
        raise UnavailableError(f"FREEMERGE_IMPL={wish}: there is auto, cpu and reference")
    if array is not None and is_tensor(array):
        return _for_tensor(op, array, wish)
    if wish == "reference":
        return None
    found = getattr(_cpu, op, None)
    if found is None and wish == "cpu":
        raise UnavailableError(
            f"FREEMERGE_IMPL=cpu: {op} has no compiled version here ({missing or 'not written yet'})"
        )
    return found


def gpu_tool(op: str) -> str:
    """What the GPU version of `op` is written in: "triton" or "cuda". Imports neither."""
    folder = _gpu_folder(op)
    if folder is None:
        raise UnavailableError(f"{op} has no GPU version; pass NumPy arrays")
    return folder


def has_gpu_version(op: str) -> bool:
    """Whether `op` is written for GPUs, on whatever machine this is."""
    return _gpu_folder(op) is not None


def _gpu_folder(op: str) -> str | None:
    for folder in GPU_FOLDERS:
        if importlib.util.find_spec(f"freemerge.kernels.{folder}.{op}"):
            return folder
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the GPU versions, on CPU tensors: for tests on machines without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _for_tensor(op: str, tensor: Array, wish: str) -> Callable:
    if wish != "auto":
        raise UnavailableError(f"FREEMERGE_IMPL={wish}: {op} was given a tensor on {tensor.device}; pass NumPy arrays")
    if interpreted():
        return _one_at_a_time(gpu_version(op))
    if tensor.device.type != "cuda":
        raise UnavailableError(f"{op} was given a tensor on {tensor.device}; pass NumPy arrays or CUDA tensors")
    run, kind = gpu_version(op), (op, tensor.dtype, tensor.device)
    if kind not in _compiled:
        run = _one_at_a_time(run, kind)

    def on_its_device(*args):
        with sys.modules["torch"].cuda.device(tensor.device):
            return run(*args)

    return on_its_device


def _one_at_a_time(run: Callable, kind: tuple | None = None) -> Callable:
    def alone(*args):
        with _alone:
            result = run(*args)
        if kind is not None:
            _compiled.add(kind)
        return result

    return alone


@cache
def gpu_version(op: str) -> Callable:
    """The GPU version of `op`, imported.

    Raises:
        UnavailableError: a package it needs is not installed, or does not load.
    """
    try:
        return getattr(importlib.import_module(f"freemerge.kernels.{gpu_tool(op)}.{op}"), op)
    except ImportError as error:
        raise UnavailableError(f"{op} on a GPU: {error}; pip install 'freemerge[gpu]'") from error


def set_threads(count: int) -> None:
    """Let compiled ops use `count` threads; 0 means one for each core this process may use."""
    if _cpu is not None:
        _cpu.set_threads(count)


def threads() -> int:
    return _cpu.threads() if _cpu is not None else 1
