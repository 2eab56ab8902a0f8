import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.balance_scores import balance_scores, balance_scores_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array

# sums, products, e^x and tanh of a few ulps each, of scores up to T e^T; e^x carries the error of x, up to T ulps
RTOL, ATOL = 3e-6, 1e-7


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 2.0])  # tanh of small numbers, and of large ones
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference(dtype, n, scale, normalized):
    base = np.zeros(n, dtype)
    experts = [random_array(n, dtype, seed=t, scale=scale) for t in range(3)]
    arguments = (base, experts, [0.1 * scale, 0.0, 0.5 * scale], [2 * scale, 3 * scale, 0.5 * scale], normalized)
    expected, out = poisoned((3, n), np.float32), poisoned((3, n), np.float32)
    balance_scores_reference(*arguments, expected)
    implementation("balance_scores", base)(*arguments, out)
    np.testing.assert_allclose(out, expected, rtol=RTOL, atol=ATOL * scale * scale)


def test_by_hand():
    base = np.zeros(3, np.float32)
    experts = [np.array([1, -2, 0], np.float32), np.array([1, 1, 4], np.float32)]
    out = poisoned((2, 3), np.float32)
    balance_scores(base, experts, [0.0, 1.0], [2.0, 1.0], normalized=False, out=out)
    intra = np.exp(2 * np.array([0.25, 1, 0]))  # of the second, whose magnitudes are all clipped to 1: e^0
    np.testing.assert_allclose(out[0], intra * np.tanh([2.0, 2.0, 0]), rtol=RTOL)
    np.testing.assert_allclose(out[1], np.tanh([2.0, -1.0, 16.0]), rtol=RTOL)
    balance_scores(base, experts, [0.0, 1.0], [2.0, 1.0], normalized=True, out=out)
    np.testing.assert_allclose(out[0], intra * np.tanh([0.5, 2.0, 0]), rtol=RTOL)


def test_nan_stays_nan():
    base, out = np.zeros(2, np.float32), poisoned((1, 2), np.float32)
    balance_scores(base, [np.array([np.nan, 1], np.float32)], [0.0], [1.0], normalized=False, out=out)
    assert np.isnan(out).tolist() == [[True, False]]


def test_rejects_what_does_not_fit():
    base = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match=r"out is float32 \[3\]; scores are float32 \[1, 3\]"):
        balance_scores(base, [base], [0.0], [1.0], normalized=False, out=base)
    with pytest.raises(ShapeError, match="2 lows for 1 experts"):
        balance_scores(base, [base], [0.0, 1.0], [1.0], normalized=False, out=base)
