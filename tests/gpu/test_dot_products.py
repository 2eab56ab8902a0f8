import numpy as np
import pytest

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.dot_products import dot_products, dot_products_reference
from freemerge.testing import FLOATS, random_array, to_gpu

SHAPES = [(), (1,), (1009,), (0,), (3, 0), (0, 3), (9, 130), (2, 2001), (2001, 2), (4, 5, 6)]


def assert_matches_reference(base, arrays, lines):
    expected = dot_products_reference(base, arrays, lines)
    result = dot_products(None if base is None else to_gpu(base), list(map(to_gpu, arrays)), lines=lines)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float64
    assert result.shape == expected.shape
    # float64 sums in another order, of terms near 1
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14 * max(1, arrays[0].size))


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, lines):
    base, *arrays = (np.asarray(random_array(shape, BFLOAT16, seed=t)) for t in range(3))
    assert_matches_reference(base, arrays, lines)
    assert_matches_reference(None, arrays, lines)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_several_groups_of_vectors(count):
    base, *arrays = (random_array((5, 301), np.float32, seed=t) for t in range(count + 1))
    assert_matches_reference(base, arrays, "tensor")
    assert_matches_reference(base, arrays, "row")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    base, one = random_array(700, dtype, seed=0), random_array(700, dtype, seed=1)
    assert_matches_reference(base, [one, random_array(700, np.float32, seed=2)], "tensor")
    assert_matches_reference(None, [one, base], "tensor")


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
def test_more_tiles_than_programs(monkeypatch, lines):
    monkeypatch.setattr("freemerge.kernels.triton.dot_products.MOST_PROGRAMS", 2)
    arrays = [random_array((2, 2001) if lines == "row" else (2001, 2), np.float32, seed=t) for t in range(2)]
    assert_matches_reference(None, arrays, lines)


def test_nan_shows_where_it_is():
    arrays = [np.array([[1, np.nan], [3, 4]], np.float32), np.ones((2, 2), np.float32)]
    found = dot_products(None, list(map(to_gpu, arrays)), lines="row")
    np.testing.assert_array_equal(found, [[[np.nan, np.nan], [np.nan, 2]], [[25, 7], [7, 2]]])
