import numpy as np
import pytest

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_masked import add_masked, add_masked_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu

# votes, shares, least
FORMS = {
    "sum": (None, None, 0.0),
    "shares": (None, [0.8, 0.5, -0.3], 0.0),
    "election": ([0.8, 0.5, -0.3], None, 0.0),
    "election and shares": ([1.0, 1.0, 1.0], [0.8, 0.5, 0.3], 0.4),
}


def random_mask(n, seed, density=0.4):
    return pack_mask(np.random.default_rng(seed).random(n) < density)


def assert_matches_reference(base, experts, masks, weights, form, scaling, out_dtype):
    votes, shares, least = form
    expected, out = poisoned(base.shape, out_dtype), to_gpu(poisoned(base.shape, out_dtype))
    add_masked_reference(base, experts, masks, weights, votes, shares, least, scaling, expected)
    tensors = [None if mask is None else to_gpu(mask) for mask in masks]
    options = {"votes": votes, "shares": shares, "least": least, "scaling": scaling}
    add_masked(to_gpu(base), list(map(to_gpu, experts)), tensors, weights, **options, out=out)
    got, numbers = from_gpu(out), ~np.isnan(expected.astype(np.float64))  # what bits a NaN has is open
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got[numbers].view(np.uint8), expected[numbers].view(np.uint8))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("n", [0, 1, 127, 2051])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_matches_reference_bit_for_bit(dtype, n, form):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    masks = [random_mask(n, 0), None, random_mask(n, 1)]
    assert_matches_reference(base, experts, masks, [0.8, 0.5, -0.3], form, 1.1, dtype)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_dtype(base_dtype):
    experts = [random_array(1500, dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    numbers = [0.5, 1.0, 0.25, 0.3, 0.7, -0.2]
    form, masks = (numbers, numbers, 0.0), [random_mask(1500, t) for t in range(6)]
    base = random_array(1500, base_dtype, seed=9)
    for out_dtype in (base_dtype, BFLOAT16):
        assert_matches_reference(base, experts, masks, numbers, form, 0.7, out_dtype)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_zeros_ties_and_nan(form):
    columns = [[3, 1, 0, -1, np.nan, np.nan, -0.0], [-1, -2, 0, 1, -2, 2, 0], [2, -2, 0, 0, 1, 1, -0.0]]
    experts = [np.array(column, np.float32) for column in columns]
    masks = [pack_mask(np.array([1, 1, 1, 1, 0, 1, 1], bool)), None, None]
    assert_matches_reference(np.zeros(7, np.float32), experts, masks, [1, 1, 1], form, 1.0, np.float32)


def test_no_experts():
    assert_matches_reference(random_array(50, BFLOAT16, seed=0), [], [], [], ([], [], 0.0), 1.0, np.float32)


def test_out_may_be_base():
    base, expert, mask = (
        random_array(3000, BFLOAT16, seed=0),
        random_array(3000, BFLOAT16, seed=1),
        random_mask(3000, 0),
    )
    expected, there = poisoned(3000, BFLOAT16), to_gpu(base)
    add_masked(base, [expert], [mask], [0.4], out=expected)
    add_masked(there, [to_gpu(expert)], [to_gpu(mask)], [0.4], out=there)
    np.testing.assert_array_equal(from_gpu(there), expected)
