"""Where and with what a figure was measured."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe() -> dict[str, str]:
    """cpu, cores and memory in GiB: columns of every row of results."""
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu_model(), "cores": str(cores), "memory_gib": f"{memory('MemTotal') / 2**30:.0f}"}


def others() -> str:
    """A remark if other programs want the cores too: then only figures of one run can be compared."""
    load = os.getloadavg()[0]
    return f"shared machine, load {load:.0f}" if load > len(os.sched_getaffinity(0)) + 1 else ""


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split("\t", 1) for line in lines if "\t" in line)
    name = fields.get("model name", platform.machine()).lstrip("\t: ")
    isa = [flag for flag in ("avx2", "avx512f") if flag in fields.get("flags", "").split()]
    return " ".join([name, *isa])


def memory(key: str) -> int:
    """Bytes of a line of /proc/meminfo, e.g. MemAvailable."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


@cache
def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in ("freemerge", "numpy", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found + commit())


def commit() -> list[str]:
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(git, capture_output=True, text=True)
    return [f"commit {answer.stdout.strip()}"] if answer.returncode == 0 else []
