import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_elected import add_elected_reference
from freemerge.kernels.add_masked import add_masked, add_masked_reference
from freemerge.kernels.array import task_vector
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array


def random_mask(n, seed, density=0.4):
    return pack_mask(np.random.default_rng(seed).random(n) < density)


def assert_bits(out, expected):
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


FORMS = {
    "sum": (None, None, 0.0),
    "shares": (None, [0.8, 0.5, -0.3], 0.0),
    "election": ([0.8, 0.5, -0.3], None, 0.0),
    "election and shares": ([1.0, 1.0, 1.0], [0.8, 0.5, 0.3], 0.4),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n, form):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    masks = [random_mask(n, 0), None, random_mask(n, 1)]
    arguments = (base, experts, masks, [0.8, 0.5, -0.3], *form, 1.1)
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    add_masked_reference(*arguments, expected)
    implementation("add_masked", base)(*arguments, out)
    assert_bits(out, expected)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    base, expert = random_array(1500, dtype, seed=0), random_array(1500, np.float32, seed=1)
    masks = [random_mask(1500, 0)]
    expected, out = poisoned(1500, out_dtype), poisoned(1500, out_dtype)
    add_masked_reference(base, [expert], masks, [0.5], [0.5], [0.5], 0.0, 0.7, expected)
    add_masked(base, [expert], masks, [0.5], votes=[0.5], shares=[0.5], scaling=0.7, out=out)
    assert_bits(out, expected)


def test_without_masks_it_is_add_elected_and_the_plain_sum():
    base, *experts = (random_array(3000, np.float32, seed=t) for t in range(3))
    weights = [0.8, -0.5]
    out, expected = poisoned(3000, np.float32), poisoned(3000, np.float32)
    vectors = [task_vector(base, expert) for expert in experts]
    add_elected_reference(base, vectors, weights, 0.9, True, expected)
    add_masked(base, experts, [None, None], weights, votes=weights, shares=weights, scaling=0.9, out=out)
    assert_bits(out, expected)
    add_masked(base, experts, [None, None], weights, out=out)
    np.testing.assert_allclose(out, base + 0.8 * vectors[0] - 0.5 * vectors[1], rtol=0, atol=1e-6)  # a few roundings


def test_the_election_by_hand():
    base = np.zeros(4, np.float32)
    experts = [np.array(column, np.float32) for column in ([3, 1, 0, -1], [-1, -2, 0, 1], [2, -2, 0, 9])]
    masks = [None, None, pack_mask(np.array([True, True, True, False]))]
    out = poisoned(4, np.float32)
    add_masked(base, experts, masks, [1, 1, 1], votes=[1, 1, 1], out=out)
    assert out.tolist() == [5, -4, 0, 1]  # the last: 9 is masked, the sum is 0, which elects +
    add_masked(base, experts, masks, [1, 1, 1], votes=[1, 1, 1], shares=[1, 1, 1], out=out)
    assert out.tolist() == [2.5, -2, 0, 1]
    add_masked(base, experts, masks, [1, 1, 1], votes=[1, 1, 1], shares=[1, 1, 1], least=4.0, out=out)
    assert out.tolist() == [1.25, -1, 0, 0.25]
    add_masked(base, experts, masks, [1, 1, 1], shares=[1, 1, 1], out=out)
    np.testing.assert_allclose(out, [4 / 3, -1, 0, 0], rtol=1e-6)  # of float32


def test_what_is_masked_may_be_nan():
    expert = np.array([np.nan, np.nan, 1], np.float32)
    out = poisoned(3, np.float32)
    add_masked(np.ones(3, np.float32), [expert], [pack_mask(np.array([False, True, True]))], [1.0], out=out)
    assert out[0] == 1
    assert np.isnan(out[1])
    assert out[2] == 1


def test_out_may_be_base():
    base, expert = random_array(5000, np.float32, seed=0), random_array(5000, np.float32, seed=1)
    masks = [random_mask(5000, 0)]
    expected = poisoned(5000, np.float32)
    add_masked(base, [expert], masks, [0.4], out=expected)
    add_masked(base, [expert], masks, [0.4], out=base)
    np.testing.assert_array_equal(base, expected)


def test_rejects_masks_and_numbers_that_do_not_fit():
    base = np.zeros(9, np.float32)
    with pytest.raises(ShapeError, match=r"masks\[0\] is uint8 \[1\]; a mask over 9 entries is uint8 \[2\]"):
        add_masked(base, [base], [np.zeros(1, np.uint8)], [1.0], out=base)
    with pytest.raises(ShapeError, match="2 votes for 1 experts"):
        add_masked(base, [base], [None], [1.0], votes=[1, 1], out=base)
