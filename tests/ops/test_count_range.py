import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.count_range import count_range, count_range_reference, keys_of, value_of
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, random_array

# lows and shifts of ranges: of everything, of numbers near 1 and -1, of single keys, up to the last key
RANGES = ([0, 0xBF700000, 0x40700000, 0xBF800000, 0xC0000000], [21, 10, 9, 0, 19])


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n, magnitudes):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    run = implementation("count_range", expert)
    for start in (base, None):
        for bins in (1, 2048):
            arguments = (start, expert, *RANGES, bins, magnitudes)
            counts = run(*arguments)
            np.testing.assert_array_equal(counts, count_range_reference(*arguments))
            assert (counts.sum(axis=1) == n).all()


def test_no_range_at_all():
    assert count_range(None, np.ones(3, np.float32), [], [], 4).shape == (0, 6)


def test_keys_are_ordered_like_the_numbers():
    values = np.array([-np.inf, -2.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, np.inf], np.float32)
    keys = keys_of(values).tolist()
    assert keys == sorted(set(keys))
    assert [value_of(key) for key in keys] == values.tolist()
    for key in keys:
        assert count_range(None, values, [key], [0], 1, magnitudes=False)[0, 1] == 1


def test_magnitudes_take_nan_for_infinite():
    expert = np.array([np.nan, -np.inf, np.inf, -1], np.float32)
    infinity = int(keys_of(np.array([np.inf], np.float32))[0])
    assert count_range(None, expert, [infinity], [0], 1).tolist() == [[1, 3, 0]]


def test_rejects_a_range_that_is_none():
    array = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match=r"no range of 2 bins of 2\*\*32 keys from 0x0 on"):
        count_range(None, array, [0], [32], 2)
    with pytest.raises(ShapeError, match="no range of 0 bins"):
        count_range(None, array, [0], [3], 0)
    with pytest.raises(ShapeError, match="1 shifts for 2 lows"):
        count_range(None, array, [0, 1], [3], 8)
