import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_task_vectors import add_task_vectors, add_task_vectors_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def assert_matches_reference(base, experts, weights, out_dtype):
    expected, out = poisoned(base.shape, out_dtype), to_gpu(poisoned(base.shape, out_dtype))
    add_task_vectors_reference(base, experts, weights, expected)
    add_task_vectors(to_gpu(base), list(map(to_gpu, experts)), weights, out=out)
    np.testing.assert_array_equal(bits(from_gpu(out)), bits(expected))


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 4097, 9_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_bit_for_bit(dtype, n):
    experts = [random_array(n, dtype, seed=t) for t in (1, 2, 3)]
    assert_matches_reference(random_array(n, dtype, seed=0), experts, [0.3, -0.7, 1.1], dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, out_dtype):
    experts = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    assert_matches_reference(random_array((30, 50), base_dtype, seed=9), experts, [0.5] * len(FLOATS), out_dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", [np.float64, np.float32], ids=str)
def test_one_rounding_of_ties_overflow_and_denormals(base_dtype, dtype):
    """No experts: the base, rounded. Halfway between neighbours of each dtype, and a little beside it."""
    exponents = np.ldexp(1.0, np.repeat(np.arange(-160, 140), 3))
    base = np.concatenate(
        [exponents * f for f in (1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1.0625, 1.125, 1.375)]
    )
    base = np.concatenate(
        [base, base * (1 + 2.0**-40), -base, [np.inf, -np.inf, 0.0, 448.0, 464.0, 464.1, 65519.9, 65520]]
    )
    assert_matches_reference(base.astype(base_dtype), [], [], dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_stays_nan(dtype):
    base, expert = np.array([np.nan, 1.0, 2.0], dtype), np.array([1.0, np.nan, 2.0], dtype)
    out = to_gpu(np.zeros(3, dtype))
    add_task_vectors(to_gpu(base), [to_gpu(expert)], [0.5], out=out)
    assert np.isnan(from_gpu(out).astype(np.float32)).tolist() == [True, True, False]


def test_bfloat16_denormals_are_numbers():
    base = np.arange(1, 128, dtype=np.uint16).view(BFLOAT16)
    assert_matches_reference(base, [base * 0], [0.25], np.float32)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
def test_out_may_be_base(dtype):
    base, expert = random_array(5000, dtype, seed=0), random_array(5000, dtype, seed=1)
    expected, tensor = poisoned(5000, dtype), to_gpu(base)
    add_task_vectors_reference(base, [expert], [0.4], expected)
    add_task_vectors(tensor, [to_gpu(expert)], [0.4], out=tensor)
    np.testing.assert_array_equal(bits(from_gpu(tensor)), bits(expected))


def test_views_at_odd_offsets():
    base, expert = random_array(3001, BFLOAT16, seed=0), random_array(3002, np.float32, seed=1)
    expected, out = poisoned(3000, BFLOAT16), to_gpu(poisoned(3003, BFLOAT16))
    add_task_vectors_reference(base[1:], [expert[2:]], [0.4], expected)
    add_task_vectors(to_gpu(base)[1:], [to_gpu(expert)[2:]], [0.4], out=out[3:])
    np.testing.assert_array_equal(bits(from_gpu(out)[3:]), bits(expected))
    assert np.isnan(from_gpu(out)[:3].astype(np.float32)).all()


def test_a_single_number():
    assert_matches_reference(np.array(2.0, np.float32), [np.array(3.0, np.float32)], [0.5], np.float32)


def test_rejects_arrays_of_two_kinds():
    with pytest.raises(ShapeError, match="a NumPy array, where base is"):
        add_task_vectors(to_gpu(np.zeros(3)), [np.zeros(3)], [1.0], out=to_gpu(np.zeros(3)))
