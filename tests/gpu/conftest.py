"""GPU versions of ops: on a GPU where there is one, elsewhere in Triton's interpreter and a CUDA emulator."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any module of kernels/triton
