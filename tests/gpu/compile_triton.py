"""Compiles the kernels of triton_signatures.py without a GPU; prints their resources as JSON, one kernel a line.

A program of its own: where Triton interprets (TRITON_INTERPRET=1), it does not compile.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_signatures import SIGNATURES

from freemerge.kernels import triton as package

ARCHITECTURES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def kernels() -> dict[str, triton.JITFunction]:
    """Every `_<op>_kernel` of every module in kernels/triton, by `module.kernel`."""
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.module == module.__name__:
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    return found


def source(kernel: triton.JITFunction, arguments: dict) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if not isinstance(value, str | tuple):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        types = {(i,): value} if isinstance(value, str) else {(i, j): item for j, item in enumerate(value) if item}
        signature[name] = value.partition(":")[0] if isinstance(value, str) else tuple(v or "constexpr" for v in value)
        constants |= {(i, j): None for j, item in enumerate(value) if item is None}
        attributes |= {path: [["tt.divisibility", 16]] for path, ty in types.items() if ty[0] == "*" or ":16" in ty}
    return ASTSource(kernel, signature, constants, attributes)


def resources(kernel: triton.JITFunction, arguments: dict, architecture: int) -> dict[str, int]:
    """Registers, shared memory, stack and local memory in bytes, and the PTX's widest load in bits."""
    options = {"enable_fp_fusion": False}
    options |= {key: arguments[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in arguments}
    compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    copies = re.findall(
        r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], 0x(\w+)", compiled.asm["ptx"]
    )  # straight to shared memory
    widest = max([int(count or 1) * int(bits) for count, bits in loads] + [8 * int(b, 16) for b in copies], default=0)
    return used | {"shared": compiled.metadata.shared, "load": widest}


def main() -> None:
    found = kernels()
    print(json.dumps({"kernels": sorted(found)}))
    for name, arguments in SIGNATURES.items():
        for architecture in ARCHITECTURES:
            used = resources(found[name.partition(" ")[0]], arguments, architecture)
            print(json.dumps({"name": name, "architecture": f"sm_{architecture}"} | used))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "Triton would interpret the kernels"
    sys.exit(main())
