import numpy as np
import pytest

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.unified_vector import unified_vector, unified_vector_reference
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, experts, out_dtype):
    masks, out = [np.full_like(empty_mask(base), 0xAA) for _ in experts], poisoned(base.shape, out_dtype)
    there, target = [to_gpu(mask) for mask in masks], to_gpu(out)
    found = unified_vector(to_gpu(base), list(map(to_gpu, experts)), masks=there, out=target)
    expected = unified_vector_reference(base, experts, masks, out)
    for tensor, mask in zip(there, masks, strict=True):
        np.testing.assert_array_equal(from_gpu(tensor), mask)
    np.testing.assert_array_equal(from_gpu(target).astype(np.float64), out.astype(np.float64))
    assert not (np.signbit(from_gpu(target)) & (out == 0)).any()
    # another order of float64 additions of numbers that are not negative
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 9, 2051])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, n):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    assert_matches_reference(base, experts, dtype)


@pytest.mark.parametrize(("dtype", "out_dtype"), list(zip(FLOATS, FLOATS[::-1], strict=True)), ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    experts = [random_array((30, 50), own, seed=t) for t, own in enumerate(FLOATS)]
    assert_matches_reference(random_array((30, 50), dtype, seed=9), experts, out_dtype)


@pytest.mark.parametrize("count", [1, 2, 13])
def test_any_number_of_experts(count):
    base, *experts = (random_array(1030, BFLOAT16, seed=t) for t in range(count + 1))
    assert_matches_reference(base, experts, BFLOAT16)


def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr("freemerge.kernels.triton.unified_vector.MOST_PROGRAMS", 4)
    base, *experts = (random_array(9_001, BFLOAT16, seed=t) for t in range(3))
    assert_matches_reference(base, experts, np.float32)


def test_ties_zeros_and_what_is_not_finite():
    columns = [[3, -1, 0, np.nan, np.inf, -0.0, np.inf], [-3, -1, 0, 1, -np.inf, 0, 1], [0, 3, -0.0, 2, 1, -0.0, -2]]
    assert_matches_reference(np.zeros(7, np.float32), [np.array(c, np.float32) for c in columns], np.float32)
