import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_task_vectors import add_task_vectors, add_task_vectors_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 4097, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    base = random_array(n, dtype, seed=0)
    experts = [random_array(n, dtype, seed=t) for t in (1, 2, 3)]
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    add_task_vectors_reference(base, experts, [0.3, -0.7, 1.1], expected)
    implementation("add_task_vectors", base)(base, experts, [0.3, -0.7, 1.1], out)
    # The C++ is compiled without fused multiply-add, so it rounds where NumPy rounds.
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("expert_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, expert_dtype, out_dtype):
    base, expert = random_array(1500, base_dtype, seed=0), random_array(1500, expert_dtype, seed=1)
    expected, out = poisoned(1500, out_dtype), poisoned(1500, out_dtype)
    add_task_vectors_reference(base, [expert], [0.5], expected)
    add_task_vectors(base, [expert], [0.5], out=out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_experts_copies_the_base_with_one_rounding(dtype):
    base = random_array(3000, np.float64, seed=0, scale=100.0)
    base[:6] = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-8]
    out = poisoned(3000, dtype)
    add_task_vectors(base, [], [], out=out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.astype(np.float64), base.astype(dtype).astype(np.float64))


def test_out_may_be_base():
    base, expert = random_array(5000, np.float32, seed=0), random_array(5000, np.float32, seed=1)
    expected = poisoned(5000, np.float32)
    add_task_vectors_reference(base, [expert], [0.4], expected)
    add_task_vectors(base, [expert], [0.4], out=base)
    np.testing.assert_array_equal(base, expected)


def test_arrays_may_lie_at_odd_addresses():
    raw = np.zeros(2 * 3001 + 1, np.uint8)
    base = raw[1:].view(FLOATS[3])
    expert = random_array(3001, FLOATS[3], seed=1)
    out = poisoned(3001, FLOATS[3])
    add_task_vectors(base, [expert], [1.0], out=out)
    np.testing.assert_array_equal(out, expert)


def test_rejects_an_expert_of_another_shape():
    with pytest.raises(ShapeError, match=r"experts\[1\] is \[4, 6\], base is \[4, 5\]"):
        add_task_vectors(np.zeros((4, 5)), [np.zeros((4, 5)), np.zeros((4, 6))], [1, 1], out=np.zeros((4, 5)))


def test_rejects_the_wrong_number_of_weights():
    with pytest.raises(ShapeError, match="1 weights for 2 experts"):
        add_task_vectors(np.zeros(3), [np.zeros(3), np.zeros(3)], [1.0], out=np.zeros(3))


def test_rejects_integers():
    with pytest.raises(ShapeError, match="int64, not a float type"):
        add_task_vectors(np.zeros(3, np.int64), [], [], out=np.zeros(3))
