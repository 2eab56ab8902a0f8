import emulator
import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.count_range import count_range, count_range_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

# lows and shifts of ranges: of everything, of numbers near 1 and -1, of single keys
RANGES = ([0, 0xBF700000, 0x40700000, 0xBF800000], [21, 10, 9, 0])


def assert_matches_reference(base, expert, lows, shifts, bins, magnitudes):
    there = None if base is None else to_gpu(base)
    counts = count_range(there, to_gpu(expert), lows, shifts, bins, magnitudes=magnitudes)
    expected = count_range_reference(base, expert, lows, shifts, bins, magnitudes)
    np.testing.assert_array_equal(from_gpu(counts), expected)


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("n", [0, 1, 127, 4099])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n, magnitudes):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    assert_matches_reference(base, expert, *RANGES, 2048, magnitudes)
    assert_matches_reference(None, expert, *RANGES, 5, magnitudes)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    for t, dtype in enumerate(FLOATS):
        base, expert = random_array((7, 30), base_dtype, seed=9), random_array((7, 30), dtype, seed=t)
        assert_matches_reference(base, expert, [0], [21], 2048, False)


@pytest.mark.parametrize("descending", [False, True])
def test_more_tiles_than_blocks_in_any_order(monkeypatch, descending):
    monkeypatch.setattr("freemerge.kernels.cuda.count_range.MOST_BLOCKS", 2)
    monkeypatch.setattr(emulator, "descending", descending)
    base, expert = random_array(21_001, BFLOAT16, seed=0), random_array(21_001, BFLOAT16, seed=1)
    assert_matches_reference(base, expert, *RANGES, 100, True)


def test_what_is_not_finite():
    expert = np.array([np.nan, -np.inf, np.inf, -0.0, 0.0, -1, 1e-45], np.float32)
    assert_matches_reference(None, expert, [0], [16], 1 << 16, True)
    assert_matches_reference(None, expert[1:], [0, 0x7F800000], [16, 8], 1 << 16, False)
