"""The GPUs of this machine: which are used, and why none is.

torch is imported only where a driver with a GPU is there: on other machines "auto" costs a look for a library.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from freemerge.accelerator import Accelerator
from freemerge.errors import RecipeError, UnavailableError
from freemerge.kernels import dispatch
from freemerge.methods import Method

PACKAGES = "pip install 'freemerge[gpu]'"


def find(device: str = "auto", max_gpu_memory: int | None = None) -> list[Accelerator]:
    """The accelerators `device` means; none for the CPU.

    Args:
        device: "auto" (every visible GPU, or the CPU where there is none to use), "cpu", "cuda" (every visible GPU),
            "cuda:N" (one of them); for tests "interpreter", Triton's, on the CPU.
        max_gpu_memory: bytes to stay under on each; by default 80 % of what is free now.

    Raises:
        UnavailableError: a GPU is asked for by name and cannot be used; says what is missing and how to get it.
        RecipeError: there is no such device.
    """
    if device == "interpreter" and dispatch.interpreted():
        return [Accelerator.interpreter(max_gpu_memory)]
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise RecipeError(f"device {device}: there are auto, cpu, cuda (all GPUs) and cuda:N (one of them)")
    if device == "cpu":
        return []
    reason = why_not()
    if reason is not None:
        if device == "auto":
            return []
        raise UnavailableError(f"device {device}: {reason}")
    found, refused = _cuda(device, max_gpu_memory)
    if refused and device != "auto":
        raise UnavailableError(f"device {device}: {'; '.join(refused)}; `nvidia-smi` shows who uses it")
    return found


def find_for(used: Sequence[Method], device: str = "auto", max_gpu_memory: int | None = None) -> list[Accelerator]:
    """As `find`, for merges by these methods: "auto" is the CPU where an op of theirs has no GPU version.

    Raises:
        UnavailableError: a GPU is asked for by name and cannot be used, or not by these methods.
        RecipeError: there is no such device.
    """
    lacking = {method.name: [op for op in sorted(method.ops) if not dispatch.has_gpu_version(op)] for method in used}
    lacking = {name: ops for name, ops in lacking.items() if ops}
    if not lacking or device == "cpu":
        return find(device, max_gpu_memory)
    if device == "auto":
        return []
    name, ops = next(iter(lacking.items()))
    raise UnavailableError(
        f"device {device}: {name} runs on the CPU only, {', '.join(ops)} has no GPU version; leave the device out"
    )


def _cuda(device: str, max_gpu_memory: int | None) -> tuple[list[Accelerator], list[str]]:
    """The GPUs a name means, and what is wrong with those that are there but cannot be used: full, or not shared."""
    import torch

    indices = range(torch.cuda.device_count())
    if ":" in device:
        index = int(device.partition(":")[2])
        if index not in indices:
            there = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in indices)
            raise UnavailableError(f"device {device}: there is {there}")
        indices = [index]
    found, refused = [], []
    for index in indices:
        try:
            found.append(Accelerator.cuda(torch.device("cuda", index), max_gpu_memory))
        except RuntimeError as error:
            refused.append(f"cuda:{index} cannot be used ({str(error).splitlines()[0]})")
    return found, refused


# -- why a GPU is not used ----------------------------------------------------------------------------------------


def why_not() -> str | None:
    """What keeps this machine's GPUs from being used, with the remedy; None where nothing does."""
    wish = os.environ.get("FREEMERGE_IMPL", "auto")
    if wish != "auto":
        return f"FREEMERGE_IMPL={wish} asks for the CPU; unset it"
    return _driver_trouble() or _torch_trouble() or _package_trouble()


@dataclass(frozen=True)
class Driver:
    """What libcuda says: the CUDA version it serves, and how many GPUs it lets this process see."""

    version: tuple[int, int]
    gpus: int


def driver() -> Driver | str:
    """The CUDA driver, or why there is none. Needs no package."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver here (libcuda.so.1 is not found)"
    version, count = ctypes.c_int(), ctypes.c_int()
    status = (
        cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count))
    )
    if status not in (0, 100):  # 100: CUDA_ERROR_NO_DEVICE
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return Driver((version.value // 1000, version.value % 1000 // 10), count.value)


def _driver_trouble() -> str | None:
    found = driver()
    if isinstance(found, str):
        return f"{found}; install or mend NVIDIA's driver, or use the CPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1") or (hidden is not None and not found.gpus):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs; unset it, or name one of them"
    return None if found.gpus else "the NVIDIA driver shows no GPU; see `nvidia-smi`"


def _torch_trouble() -> str | None:
    if not installed("torch"):
        return f"torch is not installed; {PACKAGES}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install torch's CUDA build (pytorch.org)"
    if torch.cuda.is_available():
        return None
    found, needed = driver(), _major(torch.version.cuda)
    if isinstance(found, Driver) and found.version[0] < needed:
        there = ".".join(map(str, found.version))
        return (
            f"the NVIDIA driver serves CUDA {there}, torch {torch.__version__} needs CUDA {needed}; "
            f"update the driver, or install a torch built for CUDA {found.version[0]}"
        )
    return f"torch {torch.__version__} cannot use the GPU; `python -c 'import torch; torch.cuda.init()'` says why"


def _package_trouble() -> str | None:
    import torch

    missing = [package for package in ("triton", "cupy") if not installed(package)]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; {PACKAGES}"
    built, needed = cupy_major(), _major(torch.version.cuda)
    if built is not None and built != needed:
        return (
            f"cupy is built for CUDA {built}, torch for CUDA {needed}; "
            f"pip uninstall cupy-cuda{built}x, then pip install cupy-cuda{needed}x"
        )
    return None


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def cupy_major() -> int | None:
    """The CUDA version the installed cupy is built for, by its distribution's name; None where that does not say."""
    for major in range(11, 21):
        try:
            importlib.metadata.version(f"cupy-cuda{major}x")
        except importlib.metadata.PackageNotFoundError:
            continue
        return major
    return None


def _major(version: str) -> int:
    return int(version.partition(".")[0])
