import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import pack_mask
from freemerge.kernels.dispatch import implementation, set_threads
from freemerge.kernels.mask_statistics import mask_statistics, mask_statistics_reference
from freemerge.testing import FLOATS, random_array


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n):
    base, expert = random_array(n, dtype, seed=0), random_array(n, dtype, seed=1)
    mask = pack_mask(np.random.default_rng(2).random(n) < 0.3)
    for start in (base, None):
        expected = mask_statistics_reference(start, expert, mask)
        result = implementation("mask_statistics", expert)(start, expert, mask)
        assert result[0] == expected[0]
        np.testing.assert_allclose(result[1:], expected[1:], rtol=1e-13)  # float64 sums in another order


def test_by_hand():
    expert = np.array([[1, -2], [3, np.nan]], np.float32)
    found = mask_statistics(None, expert, pack_mask(np.array([True, True, False, False])))
    assert (found.count, found.kept_abs, found.kept_squares) == (2, 3, 5)
    assert np.isnan(found.sum_abs)


def test_sums_do_not_depend_on_threads():
    expert, mask = random_array(300_000, np.float32, seed=0), pack_mask(np.arange(300_000) % 3 == 0)
    results = set()
    for threads in (1, 2, 5):
        set_threads(threads)
        results.add(mask_statistics(None, expert, mask))
    set_threads(0)
    assert len(results) == 1


def test_rejects_a_mask_of_another_size():
    with pytest.raises(ShapeError, match="a mask over 3 entries"):
        mask_statistics(None, np.zeros(3, np.float32), np.zeros(4, np.uint8))
