import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.count_magnitudes import allot_ties, count_magnitudes, count_magnitudes_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, random_array


@pytest.mark.parametrize("n", [0, 1, 1009, 65537, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    for value in (0.0, 0.5, 1.0, np.inf):
        for start in (base, None):
            result = implementation("count_magnitudes", expert)(start, expert, value)
            assert result == count_magnitudes_reference(start, expert, value)


def test_counts():
    assert count_magnitudes(None, np.array([-3, 2, 2, -2, 0, np.nan, np.inf]), 2.0) == (3, 3)
    assert count_magnitudes(None, np.array([-3, np.nan, np.inf]), np.inf) == (0, 2)


def test_ties_are_allotted_in_order():
    assert allot_ties([3, 0, 4, 2], 5) == [3, 0, 2, 0]
    assert allot_ties([], 0) == []


def test_rejects_a_negative_value():
    with pytest.raises(ShapeError, match=r"-1\.0 is not a magnitude"):
        count_magnitudes(None, np.zeros(3), -1.0)
