import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.near_swap import near_swap, near_swap_reference
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("n", [0, 1, 1025, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    base, expert = (random_array(n, dtype, seed=t) for t in range(2))
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    near_swap_reference(base, expert, 0.1, expected)
    implementation("near_swap", base)(base, expert, 0.1, out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


def test_by_hand():
    base, expert = np.zeros(4, np.float32), np.array([0.5, 2, -4, 0], np.float32)
    out = poisoned(4, np.float32)
    near_swap(base, expert, 1.0, out=out)
    assert out.tolist() == [0.5, 1, -1, 0]
    near_swap(base, expert, 1.0, out=base)
    assert base.tolist() == out.tolist()


def test_nan_stays_nan():
    out = poisoned(2, np.float32)
    near_swap(np.array([np.nan, 1], np.float32), np.array([1, 1], np.float32), 1.0, out=out)
    assert np.isnan(out[0])
    assert out[1] == 1


def test_rejects_an_expert_of_another_shape():
    with pytest.raises(ShapeError, match=r"expert is \[4\]"):
        near_swap(np.zeros(3), np.zeros(4), 1.0, out=np.zeros(3))
