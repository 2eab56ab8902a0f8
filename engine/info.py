"""What is built and in use on this machine."""

import importlib.metadata
import os
import platform

import numpy as np

from freemerge import __version__, devices, kernels
from freemerge.errors import UnavailableError
from freemerge.kernels import dispatch
from freemerge.sizes import readable_size

REQUIRED = ("numpy", "ml_dtypes", "safetensors", "pydantic")
# package -> what its absence means
OPTIONAL = {
    "torch": "not installed: no pickled checkpoints (--allow-pickle), no torch tensors",
    "transformers": "not installed: merged models cannot be loaded as modules here; merging does not need it",
    "triton": "not installed: no GPU",
    "cupy": "not installed: no GPU",
}
# one package, several distributions
_DISTRIBUTIONS = {"cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x")}


def facts() -> dict[str, str]:
    """Name -> value, for people; torch is looked up, and imported only where a driver has a GPU for it."""
    return {
        "freemerge": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **{package: _version(package) or "missing" for package in REQUIRED},
        "compiled module": _compiled(),
        "instruction set": dispatch._cpu.isa() if dispatch._cpu else "-",
        "threads": f"{dispatch.threads()} (of {os.cpu_count()} cores)",
        "memory": _memory(),
        **_devices(),
        **{package: _version(package) or absence for package, absence in OPTIONAL.items()},
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("FREEMERGE_")},
    }


def ops() -> list[dict[str, str]]:
    """A row for each op: its name, the version that runs on the CPU here, and why; what its GPU version is made of."""
    return [{"op": op, **_in_use(op), "gpu": _gpu_tool(op)} for op in kernels.ops()]


def _gpu_tool(op: str) -> str:
    try:
        return dispatch.gpu_tool(op)
    except UnavailableError:
        return "none"


def _devices() -> dict[str, str]:
    """What --device auto means here; the driver and its GPUs, or why none is used."""
    driver = devices.driver()
    found = {} if isinstance(driver, str) else {"driver": f"CUDA {'.'.join(map(str, driver.version))}"}
    reason = devices.why_not()
    if reason is not None:
        return {"device": "cpu", "gpu": reason, **found}
    import torch

    gpus = {f"cuda:{index}": _gpu(torch, index) for index in range(torch.cuda.device_count())}
    return {"device": ", ".join(gpus), **gpus, **found}


def _gpu(torch, index: int) -> str:
    try:
        free, total = map(readable_size, torch.cuda.mem_get_info(index))
    except RuntimeError as error:
        return f"{torch.cuda.get_device_name(index)}, cannot be used: {str(error).splitlines()[0]}"
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"{torch.cuda.get_device_name(index)}, compute capability {capability}, {free} free of {total}"


def _in_use(op: str) -> dict[str, str]:
    wish = os.environ.get("FREEMERGE_IMPL", "auto")
    try:
        found = dispatch.implementation(op, np.empty(0, np.float32))
    except UnavailableError as error:
        return {"version": "none", "why": str(error)}
    if found is not None:
        return {"version": "cpu", "why": f"C++, {dispatch._cpu.isa()}"}
    if wish == "reference":
        return {"version": "reference", "why": "FREEMERGE_IMPL=reference asks for it"}
    if dispatch._cpu is None:
        return {"version": "reference", "why": "NumPy, slow: the compiled module is missing"}
    return {"version": "reference", "why": "NumPy: has no compiled version"}


def _compiled() -> str:
    if dispatch._cpu is not None:
        return dispatch._cpu.__file__
    return f"missing ({dispatch.missing}): everything works, slowly; `pip install .` with a C++17 compiler builds it"


def _version(package: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (ValueError, OSError):
        return "unknown"
    return f"{readable_size(total)}, {readable_size(free)} free (beside the page cache)"
