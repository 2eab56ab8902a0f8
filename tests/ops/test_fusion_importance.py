import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.fusion_importance import fusion_importance, fusion_importance_reference
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("shape", [(), (1,), (1009,), (0, 3), (3, 0), (50, 300), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, shape):
    base, expert = (np.asarray(random_array(shape, dtype, seed=t)) for t in range(2))
    expected, out = poisoned(shape, np.float32), poisoned(shape, np.float32)
    fusion_importance_reference(base, expert, expected)
    implementation("fusion_importance", base)(base, expert, out)
    # the float64 divergence differs in its last bits, and so may its float32
    np.testing.assert_allclose(out, expected, rtol=2e-7, atol=0)


def test_small_changes_never_have_a_negative_importance():
    base = random_array((20, 4096), np.float32, seed=0, scale=0.02)
    out = poisoned(base.shape, np.float32)
    fusion_importance(base, base + random_array(base.shape, np.float32, seed=1, scale=1e-7), out=out)
    assert (out >= 0).all()
    assert (out > 0).any()
    fusion_importance(base, base, out=out)
    assert not out.any()


def test_rejects_another_dtype():
    with pytest.raises(ShapeError, match="importances are float32"):
        fusion_importance(np.zeros(3), np.zeros(3), out=np.zeros(3))
