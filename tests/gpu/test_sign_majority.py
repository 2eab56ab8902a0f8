import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.sign_majority import sign_majority, sign_majority_reference
from freemerge.testing import FLOATS, random_array, to_gpu


def assert_matches_reference(base, experts, floors):
    majority = sign_majority(to_gpu(base), list(map(to_gpu, experts)), floors)
    assert majority == sign_majority_reference(base, experts, floors)


@pytest.mark.parametrize("n", [0, 1, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(3))
    assert_matches_reference(base, experts, [0.8, 0.0])


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    assert_matches_reference(random_array((30, 50), base_dtype, seed=9), experts, [0.5] * len(experts))


@pytest.mark.parametrize("count", [0, 1, 13])
def test_any_number_of_experts(count):
    base, *experts = (random_array(1030, BFLOAT16, seed=t) for t in range(count + 1))
    assert_matches_reference(base, experts, [0.5] * count)


def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.sign_majority.MOST_PROGRAMS", 3)
    base, expert = random_array(9_001, BFLOAT16, seed=0), random_array(9_001, BFLOAT16, seed=1)
    assert_matches_reference(base, [expert], [0.2])


def test_zeros_and_nan_are_counted_for_neither_sign():
    experts = [np.array(column, np.float32) for column in ([3, 1, 0, -1, 2, np.nan], [-1, 1, 0, 1, -2, 1])]
    base = np.zeros(6, np.float32)
    assert sign_majority(to_gpu(base), list(map(to_gpu, experts)), [0.0, 0.0]) == 2
    assert_matches_reference(base, experts, [2.0, 1.0])
