import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_balanced import add_balanced, add_balanced_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array

NUMBERS = ([0.1, 0.0, 0.5], [2.0, 3.0, 0.5], [0.05, 0.1, 0.0], [2.0, 3.0, 1.0], [1.0, 0.8, 1.2])
ULP = {2: 1 / 128, 1: 1 / 4}  # of the narrow dtypes, by bytes; a result on the edge may be rounded to either side


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n, normalized):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    add_balanced_reference(base, experts, *NUMBERS, normalized, expected)
    implementation("add_balanced", base)(base, experts, *NUMBERS, normalized, out)
    wide = [array.astype(np.float64) for array in (out, expected)]
    # a weight is the difference of two scores, which differ by a few ulps: a mean of entries by 1e-4 where it is near 0
    np.testing.assert_allclose(*wide, rtol=ULP.get(np.dtype(dtype).itemsize, 1e-5), atol=2e-4)


def test_by_hand():
    base = np.ones(3, np.float32)
    experts = [base + np.array([1, -2, 0], np.float32), base + np.array([1, 1, 4], np.float32)]
    scores = [np.tanh(2), np.tanh(1)]  # of equal bounds, all of them: e^0 times tanh
    out = poisoned(3, np.float32)
    bounds = [1.0, 1.0]
    add_balanced(base, experts, bounds, bounds, [0, 0], [scores[0], 2], [1, 0.5], normalized=False, out=out)
    shares = np.array([[1, 1, 0], [scores[0] / 2, 0, 0.5]])
    expected = 1 + (shares[0] * [1, -1, 0] + 0.5 * shares[1] * [1, 1, 1]) / shares.sum(0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_what_nobody_claims_stays():
    base = np.ones(2, np.float32)
    experts = [base + 1, base - 1]
    out = poisoned(2, np.float32)
    add_balanced(base, experts, [0, 0], [1, 1], [9, 9], [10, 10], [1, 1], normalized=False, out=out)
    assert out.tolist() == [1, 1]
    add_balanced(base, experts, [0, 0], [1, 1], [0, 0], [0, 0], [1, 1], normalized=False, out=out)  # all scores equal
    assert out.tolist() == [1, 1]


def test_out_may_be_base():
    base, *experts = (random_array(5000, np.float32, seed=t) for t in range(4))
    expected = poisoned(5000, np.float32)
    add_balanced(base, experts, *NUMBERS, normalized=True, out=expected)
    add_balanced(base, experts, *NUMBERS, normalized=True, out=base)
    np.testing.assert_array_equal(base, expected)


def test_rejects_another_number_of_weights():
    base = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match="2 weights for 1 experts"):
        add_balanced(base, [base], [0], [1], [0], [1], [1, 1], normalized=False, out=base)
