import emulator
import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.count_digits import count_digits, count_digits_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

DIGITS = [(21, 11), (10, 11), (0, 10), (4, 16)]
BEGUN = (0xBF812345, 0x40C00000)  # keys of a number near 1, and of one below 0


def assert_matches_reference(base, expert, found, below, width, magnitudes):
    there = None if base is None else to_gpu(base)
    counts = count_digits(there, to_gpu(expert), found, below, width, magnitudes=magnitudes)
    expected = count_digits_reference(base, expert, found, below, width, magnitudes)
    np.testing.assert_array_equal(from_gpu(counts), expected)


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("n", [0, 1, 127, 4099])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n, magnitudes):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    for below, width in DIGITS:
        assert_matches_reference(base, expert, BEGUN[0], below, width, magnitudes)
    assert_matches_reference(None, expert, BEGUN[1], 10, 11, magnitudes)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    for t, dtype in enumerate(FLOATS):
        base, expert = random_array((7, 30), base_dtype, seed=9), random_array((7, 30), dtype, seed=t)
        assert_matches_reference(base, expert, 0, 21, 11, False)


@pytest.mark.parametrize("descending", [False, True])
def test_more_tiles_than_blocks_in_any_order(monkeypatch, descending):
    monkeypatch.setattr("freemerge.kernels.cuda.count_digits.MOST_BLOCKS", 2)
    monkeypatch.setattr(emulator, "descending", descending)
    base, expert = random_array(21_001, BFLOAT16, seed=0), random_array(21_001, BFLOAT16, seed=1)
    assert_matches_reference(base, expert, BEGUN[0], 10, 11, True)


def test_what_is_not_finite():
    expert = np.array([np.nan, -np.inf, np.inf, -0.0, 0.0, -1, 1e-45], np.float32)
    assert_matches_reference(None, expert, 0, 16, 16, True)
    assert_matches_reference(None, expert[1:], 0, 16, 16, False)
