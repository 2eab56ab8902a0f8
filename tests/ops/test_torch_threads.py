"""Ops that run between torch's own do so on torch's threads, which would otherwise spin beside ours."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")

# multiplies with experts, large enough to be shared out, and prints how many threads that started
SCRIPT = """
import os, sys
import numpy as np
import torch
from freemerge.kernels.add_expert_products import add_expert_products
from freemerge.kernels.array import SparseRows
from freemerge.kernels.dispatch import set_threads

set_threads(2)
torch.set_num_threads(2)
offsets = np.arange(0, 64 * 513, 64)
expert = SparseRows(offsets, np.tile(np.arange(0, 512, 8, np.uint16), 512), np.ones(64 * 512, np.float32), (512, 512))
x, out, weights = np.ones((512, 512), np.float32), np.zeros((512, 512), np.float32), np.ones((512, 1), np.float32)
torch.ones(1024, 1024) @ torch.ones(1024, 1024)
before = len(os.listdir("/proc/self/task"))
if "fork" in sys.argv and (child := os.fork()):
    sys.exit(os.waitpid(child, 0)[1])
add_expert_products(x, [expert], [1.0], weights, out=out)
assert (out == 64).all()
print(len(os.listdir("/proc/self/task")) - before)
"""


def threads_started(*arguments: str) -> int:
    command = [sys.executable, "-P", "-c", SCRIPT, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and for torch's OpenMP under its Linux name")
def test_products_of_experts_are_computed_on_threads_torch_has():
    assert threads_started() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_has_threads_of_its_own():
    """OpenMP's threads stayed behind in the parent: waiting for them would last for ever."""
    assert threads_started("fork") != 0
