import numpy as np
import pytest

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.drop_mask import drop_mask, drop_mask_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

KEYS = [(0x12345678, 0x9ABCDEF0), (0, 0), (0xFFFFFFFF, 0x80000000), (1, 16)]


def assert_matches_reference(base, expert, density, epsilon, key=KEYS[0]):
    expected, out = empty_mask(expert), to_gpu(np.full_like(empty_mask(expert), 0xAA))
    drop_mask_reference(base, expert, density, epsilon, key, expected)
    start = None if base is None else to_gpu(base)
    drop_mask(start, to_gpu(expert), density=density, epsilon=epsilon, key=key, out=out)
    np.testing.assert_array_equal(from_gpu(out), expected)


@pytest.mark.parametrize("n", [0, 1, 3, 8, 63, 64, 1009, 8_197])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1 - 1e-12, 1.0])
def test_constant_probability(n, density):
    assert_matches_reference(None, np.zeros(n, np.float32), density, 0.0)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_key(key):
    assert_matches_reference(None, np.zeros(301, np.float32), 0.7, 0.0, key)
    assert_matches_reference(None, np.arange(301, dtype=np.float32), 0.5, 0.5, key)


@pytest.mark.parametrize("shape", [(), (1,), (1009,), (3, 1301), (5, 1), (0, 3), (3, 0), (4, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_ranked_probability(tied, shape):
    base, expert = (np.asarray(random_array(shape, BFLOAT16, seed=seed)) for seed in (0, 1))
    if tied:
        base, expert = (np.asarray(np.round(array.astype(np.float32))).astype(BFLOAT16) for array in (base, expert))
    assert_matches_reference(base, expert, 0.5, 0.3)
    assert_matches_reference(None, expert, 0.9, 0.1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    assert_matches_reference(random_array((4, 99), dtype, seed=0), random_array((4, 99), np.float32, seed=1), 0.4, 0.2)


def test_nan_has_the_highest_rank():
    assert_matches_reference(None, np.array([[1, np.nan, 2, -np.inf, np.nan, 0] * 20], np.float32), 0.5, 0.5)


def test_lines_put_in_order_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.drop_mask.AT_ONCE", 250)
    assert_matches_reference(None, random_array((5, 101), np.float32, seed=0), 0.5, 0.3)
    assert_matches_reference(None, random_array((3, 31, 3), np.float32, seed=0), 0.5, 0.3)
