"""The C++ of csrc compiles for ARM, where there is no other instruction set to choose than the compiler's own."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPILER = shutil.which("aarch64-linux-gnu-g++")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(COMPILER is None, reason="no cross-compiler: apt-get install g++-aarch64-linux-gnu")
def test_every_file_compiles():
    def problems(source):
        command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-DFREEMERGE_ISA=portable"]
        return subprocess.run([*command, f"-I{ROOT / 'csrc/include'}", source], capture_output=True, text=True).stderr

    sources = sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/runtime/*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        assert "".join(pool.map(problems, sources)) == ""
