import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.dispatch import implementation, set_threads
from freemerge.kernels.dot_products import dot_products, dot_products_reference
from freemerge.testing import FLOATS, random_array

SHAPES = [(), (1,), (1009,), (0,), (3, 0), (0, 3), (30, 201), (3, 70_001), (70_001, 3), (4, 5, 6)]


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_compiled_version_matches_reference(with_base, shape, lines):
    base, *arrays = (np.asarray(random_array(shape, BFLOAT16, seed=t)) for t in range(4))
    start = base if with_base else None
    expected = dot_products_reference(start, arrays, lines)
    result = implementation("dot_products", base)(start, arrays, lines)
    assert result.dtype == np.float64
    assert result.shape == expected.shape
    # float64 sums in another order, of up to 210 003 terms near 1
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14 * max(1, base.size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype):
    base, one, two = (random_array(2000, dtype, seed=t) for t in range(3))
    expected = dot_products_reference(base, [one, two.astype(np.float32)], "tensor")
    np.testing.assert_allclose(dot_products(base, [one, two.astype(np.float32)]), expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    arrays = [np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 0], [0, -1]], np.float32)]
    assert dot_products(None, arrays).tolist() == [[[30, -3], [-3, 2]]]
    assert dot_products(None, arrays, lines="row").tolist() == [[[5, 1], [1, 1]], [[25, -4], [-4, 1]]]
    assert dot_products(None, arrays, lines="column").tolist() == [[[10, 1], [1, 1]], [[20, -4], [-4, 1]]]


def test_sums_do_not_depend_on_threads():
    arrays = [random_array((300, 1001), np.float32, seed=t) for t in range(2)]
    results = set()
    for threads in (1, 2, 5):
        set_threads(threads)
        results.add(tuple(dot_products(None, arrays, lines=lines).tobytes() for lines in ("tensor", "row", "column")))
    set_threads(0)
    assert len(results) == 1


def test_rejects_arrays_of_two_shapes():
    with pytest.raises(ShapeError, match=r"arrays\[1\] is \[4\]"):
        dot_products(None, [np.zeros(3, np.float32), np.zeros(4, np.float32)])
