"""GPU versions of ops: on a GPU where there is one, elsewhere in Triton's interpreter and a CUDA emulator."""

import numpy as np
import pytest

pytest.importorskip("triton")
import emulator
import torch

from freemerge.kernels.cuda import _compile


@pytest.fixture(autouse=True, scope="module")
def _as_silent_as_a_gpu():
    """The interpreter computes in NumPy, which warns of overflow and NaN where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _cuda_kernels(monkeypatch):
    """Without a GPU, kernels of csrc/cuda are emulated."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(_compile, "load", emulator.load)
