"""GPU versions of ops: on a GPU where there is one, elsewhere in Triton's interpreter and a CUDA emulator."""

import pytest

from freemerge.testing import interpret_triton

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

if not torch.cuda.is_available():
    interpret_triton()
