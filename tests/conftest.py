"""Before anything imports Triton: without a GPU its interpreter runs the kernels of kernels/triton."""

import pytest

from freemerge.testing import interpret_triton

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    interpret_triton()
