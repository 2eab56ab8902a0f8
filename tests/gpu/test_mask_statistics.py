import numpy as np
import pytest

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.mask_statistics import mask_statistics, mask_statistics_reference
from freemerge.testing import FLOATS, random_array, to_gpu


def assert_matches_reference(base, expert, mask):
    expected = mask_statistics_reference(base, expert, mask)
    found = mask_statistics(None if base is None else to_gpu(base), to_gpu(expert), to_gpu(mask))
    assert found.count == expected[0]
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-12)  # float64 sums in another order
    assert [type(value) for value in found] == [int, float, float, float]


@pytest.mark.parametrize("n", [0, 1, 127, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n):
    base, expert = random_array(n, dtype, seed=0), random_array(n, np.float32, seed=1)
    mask = pack_mask(np.random.default_rng(2).random(n) < 0.3)
    assert_matches_reference(base, expert, mask)
    assert_matches_reference(None, base, mask)


def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.mask_statistics.MOST_PROGRAMS", 2)
    base, expert = random_array(5_001, BFLOAT16, seed=0), random_array(5_001, BFLOAT16, seed=1)
    assert_matches_reference(base, expert, pack_mask(np.arange(5_001) % 3 == 0))


def test_what_is_masked_may_be_nan():
    expert = to_gpu(np.array([[1, -2], [3, np.nan]], np.float32))
    found = mask_statistics(None, expert, to_gpu(pack_mask(np.array([True, True, False, False]))))
    assert (found.count, found.kept_abs, found.kept_squares) == (2, 3, 5)
    assert np.isnan(found.sum_abs)
