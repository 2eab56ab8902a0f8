import numpy as np
import pytest

from freemerge.kernels.add_trimmed import COMBINATIONS, add_trimmed, add_trimmed_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, experts, floors, zeros, combination, scaling, out_dtype):
    expected, out = poisoned(base.shape, out_dtype), to_gpu(poisoned(base.shape, out_dtype))
    add_trimmed_reference(base, experts, floors, zeros, combination, scaling, expected)
    options = {"zeros": zeros, "combination": combination, "scaling": scaling}
    add_trimmed(to_gpu(base), list(map(to_gpu, experts)), floors, **options, out=out)
    got, numbers = from_gpu(out), ~np.isnan(expected.astype(np.float64))  # what bits a NaN has is open
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got[numbers].view(np.uint8), expected[numbers].view(np.uint8))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("n", [0, 1, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_bit_for_bit(dtype, n, combination):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    assert_matches_reference(base, experts, [0.8, 0.0, 1.5], 1, combination, 0.7, dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, out_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    base = random_array((30, 50), base_dtype, seed=9)
    assert_matches_reference(base, experts, [0.5] * len(experts), -1, "mean", 1.0, out_dtype)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("zeros", [-1, 0, 1])
def test_sums_of_zero_ties_and_what_is_not_finite(zeros, combination):
    columns = [[3, 1, 2, 1, np.nan, np.inf, -0.0], [-2, -3, -2, 1, 2, -2, 0], [2, 1, 1, -1, -1, -np.inf, -0.0]]
    base, experts = np.ones(7, np.float32), [np.array(column, np.float32) + 1 for column in columns]
    assert_matches_reference(base, experts, [2.0, 2.0, 2.0], zeros, combination, 1.0, np.float32)


@pytest.mark.parametrize("count", [0, 1, 13])
def test_any_number_of_experts(count):
    base, *experts = (random_array(1030, BFLOAT16, seed=t) for t in range(count + 1))
    assert_matches_reference(base, experts, [0.5] * count, 1, "mean", 1.0, BFLOAT16)


def test_out_may_be_base():
    base, *experts = (random_array(5000, BFLOAT16, seed=t) for t in range(3))
    expected, tensor = poisoned(5000, BFLOAT16), to_gpu(base)
    add_trimmed_reference(base, experts, [0.4, 0.1], 1, "sum", 1.0, expected)
    add_trimmed(tensor, list(map(to_gpu, experts)), [0.4, 0.1], zeros=1, combination="sum", out=tensor)
    np.testing.assert_array_equal(from_gpu(tensor), expected)
