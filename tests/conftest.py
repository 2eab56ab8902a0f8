"""Before anything imports torch or Triton: torch's threads, and Triton's interpreter where there is no GPU."""

import os

import pytest

from freemerge.testing import interpret_triton

# Models in tests are small: several of torch's threads wait for one another longer than they work (ten times, where
# other tests run beside them)
os.environ.setdefault("OMP_NUM_THREADS", "1")

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    interpret_triton()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, request):
    """Outside tests/gpu `auto` means the CPU, on a machine with a GPU too; also in programs that tests start."""
    if "gpu" not in request.path.parts:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where several processes share the files, none is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
