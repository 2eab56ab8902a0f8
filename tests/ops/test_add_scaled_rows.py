import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_scaled_rows import add_scaled_rows, add_scaled_rows_reference
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.dot_products import lines_of
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", [(), (1009,), (0, 3), (3, 0), (31, 2001), (3, 70_001), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_compiled_version_matches_reference_bit_for_bit(with_base, dtype, shape, lines):
    base, *arrays = (np.asarray(random_array(shape, dtype, seed=t)) for t in range(4))
    rows, width = lines_of(shape, lines)
    weights = random_array((3, width if lines == "column" else rows), np.float32, seed=9)
    arguments = (base if with_base else None, arrays, weights, lines)
    expected, out = poisoned(shape, dtype), poisoned(shape, dtype)
    add_scaled_rows_reference(*arguments, expected)
    implementation("add_scaled_rows", out)(*arguments, out)
    np.testing.assert_array_equal(out.reshape(-1).view(np.uint8), expected.reshape(-1).view(np.uint8))


def test_by_hand():
    base, expert = np.ones((2, 2), np.float32), np.array([[1, 2], [3, 4]], np.float32)
    out = poisoned((2, 2), np.float32)
    add_scaled_rows(base, [expert], np.array([[1, 2]]), out=out)
    assert out.tolist() == [[1, 2], [5, 7]]
    add_scaled_rows(None, [expert], np.array([[1, 2]]), lines="column", out=out)
    assert out.tolist() == [[1, 4], [3, 8]]


def test_out_may_be_base():
    base, expert = (random_array((50, 60), np.float32, seed=t) for t in range(2))
    weights = random_array((1, 50), np.float32, seed=2)
    expected = poisoned((50, 60), np.float32)
    add_scaled_rows(base, [expert], weights, out=expected)
    add_scaled_rows(base, [expert], weights, out=base)
    np.testing.assert_array_equal(base, expected)


def test_rejects_weights_for_other_rows():
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError, match=r"weights are \[1, 3\]; 1 arrays have \[1, 2\]"):
        add_scaled_rows(None, [array], np.zeros((1, 3)), out=array)
