import numpy as np
import pytest

from freemerge.kernels.add_scaled_rows import add_scaled_rows, add_scaled_rows_reference
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.dot_products import lines_of
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def assert_matches_reference(base, arrays, lines, out_dtype):
    shape = arrays[0].shape
    rows, width = lines_of(shape, lines)
    weights = random_array((len(arrays), width if lines == "column" else rows), np.float32, seed=7)
    expected, out = poisoned(shape, out_dtype), to_gpu(poisoned(shape, out_dtype))
    add_scaled_rows_reference(base, arrays, weights, lines, expected)
    start = None if base is None else to_gpu(base)
    add_scaled_rows(start, list(map(to_gpu, arrays)), weights.astype(np.float64), lines=lines, out=out)
    np.testing.assert_array_equal(from_gpu(out).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", [(1009,), (0, 3), (3, 0), (500, 3), (2, 2003), (4, 5, 60), (70, 1)], ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_matches_reference_bit_for_bit(with_base, shape, lines):
    base, *arrays = (random_array(shape, BFLOAT16, seed=t) for t in range(3))
    assert_matches_reference(base if with_base else None, arrays, lines, np.float32)


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
def test_a_single_number(lines):
    base, array = (np.asarray(random_array((), np.float32, seed=t)) for t in range(2))
    weights, out = np.array([[0.5]]), to_gpu(np.zeros((), np.float32))
    add_scaled_rows(to_gpu(base), [to_gpu(array)], weights, lines=lines, out=out)
    assert from_gpu(out) == base + np.float32(0.5) * (array - base)


@pytest.mark.parametrize("base_dtype", [None, *FLOATS], ids=str)
def test_every_mixture_of_dtypes(base_dtype):
    arrays = [random_array((30, 50), dtype, seed=t) for t, dtype in enumerate(FLOATS)]
    base = None if base_dtype is None else random_array((30, 50), base_dtype, seed=9)
    assert_matches_reference(base, arrays, "row", base_dtype or BFLOAT16)
    assert_matches_reference(base, arrays, "row", np.float16)


def test_out_may_be_base():
    base, array = random_array((30, 50), BFLOAT16, seed=0), random_array((30, 50), BFLOAT16, seed=1)
    weights, expected, there = np.linspace(0, 1, 30)[None], poisoned((30, 50), BFLOAT16), to_gpu(base)
    add_scaled_rows(base, [array], weights, out=expected)
    add_scaled_rows(there, [to_gpu(array)], weights, out=there)
    np.testing.assert_array_equal(from_gpu(there), expected)
