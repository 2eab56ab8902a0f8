"""GPU versions of ops: on a GPU where there is one, elsewhere in Triton's interpreter and a CUDA emulator."""

import numpy as np
import pytest

pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="module")
def _as_silent_as_a_gpu():
    """The interpreter computes in NumPy, which warns of overflow and NaN where a GPU does not."""
    with np.errstate(all="ignore"):
        yield
