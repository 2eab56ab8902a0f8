"""Before anything imports Triton: without a GPU its interpreter runs the kernels of kernels/triton."""

import pytest

from freemerge.testing import interpret_triton

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    interpret_triton()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, request):
    """Outside tests/gpu `auto` means the CPU, on a machine with a GPU too; also in programs that tests start."""
    if "gpu" not in request.path.parts:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
