import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.count_digits import count_digits, count_digits_reference, value_of
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, random_array

DIGITS = [(21, 11), (10, 11), (0, 10), (4, 16)]


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n, magnitudes):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    run = implementation("count_digits", expert)
    for start in (base, None):
        for found in (0xBF812345, 0x40C00000):  # keys of a number near 1, and of one below 0
            for below, width in DIGITS:
                arguments = (start, expert, found, below, width, magnitudes)
                np.testing.assert_array_equal(run(*arguments), count_digits_reference(*arguments))


def test_keys_are_ordered_like_the_numbers():
    values = [-np.inf, -2.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, np.inf]
    keys = []
    for value in values:
        upper = int(np.argmax(count_digits(None, np.array([value], np.float32), 0, 16, 16, magnitudes=False)))
        lower = count_digits(None, np.array([value], np.float32), upper << 16, 0, 16, magnitudes=False)
        keys.append(upper << 16 | int(np.argmax(lower)))
    assert keys == sorted(set(keys))
    assert [value_of(key) for key in keys] == [float(np.float32(value)) for value in values]


def test_magnitudes_take_nan_for_infinite():
    expert = np.array([np.nan, -np.inf, np.inf, -1], np.float32)
    counts = count_digits(None, expert, 0, 16, 16)
    assert counts[0x8000 | 0x7F80] == 3
    assert counts[0x8000 | 0x3F80] == 1


def test_rejects_a_digit_that_is_none():
    with pytest.raises(ShapeError, match="no digit of 17 bits"):
        count_digits(None, np.zeros(3, np.float32), 0, 0, 17)
    with pytest.raises(ShapeError, match="30 below it"):
        count_digits(None, np.zeros(3, np.float32), 0, 30, 11)
