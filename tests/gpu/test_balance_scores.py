import numpy as np
import pytest

from freemerge.kernels import dispatch
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.balance_scores import balance_scores, balance_scores_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu

# sums, products, e^x and tanh of a few ulps each, of scores up to T e^T; e^x carries the error of x, up to T ulps
RTOL, ATOL = 3e-6, 1e-7


def scores(base, experts, lows, highs, normalized):
    out = to_gpu(poisoned((len(experts), base.size), np.float32))
    balance_scores(to_gpu(base), list(map(to_gpu, experts)), lows, highs, normalized=normalized, out=out)
    return from_gpu(out)


def assert_as_on_the_cpu(base, experts, lows, highs, normalized):
    """Near the reference, and the bits of the compiled version, whose arithmetic it is."""
    got = scores(base, experts, lows, highs, normalized)
    expected, compiled = poisoned(got.shape, np.float32), poisoned(got.shape, np.float32)
    balance_scores_reference(base, experts, lows, highs, normalized, expected)
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=ATOL)
    if dispatch._cpu is not None:
        dispatch._cpu.balance_scores(base, experts, lows, highs, normalized, compiled)
        np.testing.assert_array_equal(got, compiled)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scale", [0.1, 2.0])  # tanh of small numbers, and of large ones
@pytest.mark.parametrize("n", [0, 1, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_as_on_the_cpu(dtype, n, scale, normalized):
    base = np.zeros(n, dtype)
    experts = [random_array(n, dtype, seed=t, scale=scale) for t in range(3)]
    lows, highs = [0.1 * scale, 0.0, 0.5 * scale], [2 * scale, 3 * scale, 0.5 * scale]
    assert_as_on_the_cpu(base, experts, lows, highs, normalized)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    base, count = random_array((30, 50), base_dtype, seed=9), len(experts)
    # e^T of six: a hundred times what three have
    expected = poisoned((count, base.size), np.float32)
    balance_scores_reference(base, experts, [0.1] * count, [2.0] * count, True, expected)
    got = scores(base, experts, [0.1] * count, [2.0] * count, True)
    np.testing.assert_allclose(got, expected, rtol=2 * RTOL, atol=100 * ATOL)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_any_number_of_experts(count):
    base, *experts = (random_array(1030, BFLOAT16, seed=t) for t in range(count + 1))
    # tiny scores: with nine experts e^T is 8000
    got, expected = scores(base, experts, [0.1] * count, [9.0] * count, False), poisoned((count, 1030), np.float32)
    balance_scores_reference(base, experts, [0.1] * count, [9.0] * count, False, expected)
    np.testing.assert_allclose(got, expected, rtol=2 * RTOL, atol=100 * ATOL)


def test_nan_stays_nan_and_infinity_is_clipped():
    experts = [np.array([np.nan, 1, np.inf, -np.inf], np.float32)]
    got = scores(np.zeros(4, np.float32), experts, [0.0], [1.0], False)
    assert np.isnan(got).tolist() == [[True, False, False, False]]
    assert got[0, 2] == pytest.approx(np.e)
