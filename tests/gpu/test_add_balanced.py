import numpy as np
import pytest

from freemerge.kernels import dispatch
from freemerge.kernels.add_balanced import add_balanced, add_balanced_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu

NUMBERS = ([0.1, 0.0, 0.5], [2.0, 3.0, 0.5], [0.05, 0.1, 0.0], [2.0, 3.0, 1.0], [1.0, 0.8, 1.2])
ULP = {2: 1 / 128, 1: 1 / 4}  # of the narrow dtypes, by bytes; a result on the edge may be rounded to either side


def assert_as_on_the_cpu(base, experts, numbers, normalized, out_dtype):
    """Near the reference, and the bits of the compiled version, whose arithmetic it is."""
    expected, compiled, out = (poisoned(base.shape, out_dtype) for _ in range(3))
    out = to_gpu(out)
    add_balanced(to_gpu(base), list(map(to_gpu, experts)), *numbers, normalized=normalized, out=out)
    add_balanced_reference(base, experts, *numbers, normalized, expected)
    got = from_gpu(out)
    # a weight is the difference of two scores, which differ by a few ulps: a mean of entries by 1e-4 where it is near 0
    tolerance = {"rtol": ULP.get(np.dtype(out_dtype).itemsize, 1e-5), "atol": 2e-4}
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), **tolerance)
    if dispatch._cpu is not None:
        dispatch._cpu.add_balanced(base, experts, *numbers, normalized, compiled)
        np.testing.assert_array_equal(got.astype(np.float64), compiled.astype(np.float64))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_as_on_the_cpu(dtype, n, normalized):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    assert_as_on_the_cpu(base, experts, NUMBERS, normalized, dtype)


@pytest.mark.parametrize("dtypes", [FLOATS[:3], FLOATS[3:]], ids=["wide", "narrow"])
@pytest.mark.parametrize(("base_dtype", "out_dtype"), list(zip(FLOATS, FLOATS[::-1], strict=True)), ids=str)
def test_mixtures_of_dtypes(base_dtype, out_dtype, dtypes):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(dtypes)]
    assert_as_on_the_cpu(random_array((30, 50), base_dtype, seed=9), experts, NUMBERS, True, out_dtype)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_any_number_of_experts(count):
    base, *experts = (random_array(1030, BFLOAT16, seed=t) for t in range(count + 1))
    numbers = [[value] * count for value in (0.1, 9.0, 0.05, 2.0, 1.0)]
    assert_as_on_the_cpu(base, experts, numbers, False, np.float32)


def test_what_nobody_claims_stays():
    base = np.ones(2, np.float32)
    numbers = ([0, 0], [1, 1], [9, 9], [10, 10], [1, 1])
    assert_as_on_the_cpu(base, [base + 1, base - 1], numbers, False, np.float32)
    numbers = ([0, 0], [1, 1], [0, 0], [0, 0], [1, 1])  # all scores equal
    assert_as_on_the_cpu(base, [base + 1, base - 1], numbers, False, np.float32)


def test_out_may_be_base():
    base, *experts = (random_array(5000, np.float32, seed=t) for t in range(4))
    tensors, tensor, out = list(map(to_gpu, experts)), to_gpu(base), to_gpu(poisoned(5000, np.float32))
    add_balanced(tensor, tensors, *NUMBERS, normalized=True, out=out)
    add_balanced(tensor, tensors, *NUMBERS, normalized=True, out=tensor)
    np.testing.assert_array_equal(from_gpu(tensor), from_gpu(out))
