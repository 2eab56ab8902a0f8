import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.fusion_importance import fusion_importance, fusion_importance_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def importance(base, expert):
    out = to_gpu(poisoned(base.shape, np.float32))
    fusion_importance(to_gpu(base), to_gpu(expert), out=out)
    return from_gpu(out)


def assert_matches_reference(base, expert):
    expected = poisoned(base.shape, np.float32)
    fusion_importance_reference(base, expert, expected)
    # the float64 divergence differs in its last bits, and so may its float32
    np.testing.assert_allclose(importance(base, expert), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2009,), (0, 3), (3, 0), (50, 30), (700, 3), (4, 5, 6)], ids=str)
def test_matches_reference(shape):
    assert_matches_reference(*(np.asarray(random_array(shape, BFLOAT16, seed=t)) for t in range(2)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    base, expert = random_array((5, 99), dtype, seed=0), random_array((5, 99), np.float32, seed=1)
    assert_matches_reference(base, expert)
    assert_matches_reference(expert, base)


def test_small_changes_never_have_a_negative_importance():
    base = random_array((3, 2048), np.float32, seed=0, scale=0.02)
    found = importance(base, base + random_array(base.shape, np.float32, seed=1, scale=1e-7))
    assert (found >= 0).all()
    assert (found > 0).any()
    assert not importance(base, base).any()


def test_nan_and_infinity_spoil_their_row_alone():
    base = random_array((3, 20), np.float32, seed=0)
    expert = random_array((3, 20), np.float32, seed=1)
    expert[0, 3], expert[2, 5] = np.nan, np.inf
    found = importance(base, expert)
    assert np.isnan(found[[0, 2]]).all()
    assert_matches_reference(base[1:2], expert[1:2])
    np.testing.assert_array_equal(found[1:2], importance(base[1:2], expert[1:2]))
