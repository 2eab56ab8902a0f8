"""Values in 8 bits are half a step away from what they were at most, and become what they were in every other way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.errors import ShapeError
from freemerge.kernels.array import FLOAT8_E4M3FN, column_dtype, rows_of
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.parts import QuantizedRows, Rows
from freemerge.testing import poisoned, random_array

INT8 = np.dtype(np.int8)
DTYPES = [INT8, FLOAT8_E4M3FN]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows_with(values, chosen):
    """Rows of a matrix of these values, where chosen."""
    offsets = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int64)
    columns = np.nonzero(chosen)[1].astype(column_dtype(values.shape[1]))
    return Rows(offsets, columns, values[chosen], values.shape)


@st.composite
def any_rows(draw):
    height, width = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    numbers = draw(st.lists(finite, min_size=height * width, max_size=height * width))
    chosen = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    shape = (height, width)
    return rows_with(np.array(numbers, np.float32).reshape(shape), np.array(chosen, bool).reshape(shape))


def half_steps(part):
    """Of each entry, as the module says."""
    scales = np.repeat(part.row_scales, part.lengths).astype(np.float64)
    if part.values.dtype == INT8:
        return scales / 2
    magnitudes = np.maximum(np.abs(part.values.astype(np.float64)), 2.0**-6)
    return scales * 2.0 ** np.floor(np.log2(magnitudes)) / 16


@settings(deadline=None, derandomize=True, max_examples=300)
@given(rows=any_rows(), dtype=st.sampled_from(DTYPES))
def test_half_a_step_at_most_whatever_the_numbers(rows, dtype):
    part = QuantizedRows.quantized(rows, dtype)
    part.check()
    found, values = part.expanded().values.astype(np.float64), rows.values[rows.values != 0].astype(np.float64)
    assert np.isfinite(found).all()
    # quotient and product are rounded to float32, and so are the smallest scales there are
    room = 1e-6 * np.abs(values) + 2.0**-149
    assert (np.abs(found - values) <= half_steps(part) + room).all()
    assert (np.sign(found) * np.sign(values) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_nearest_and_even_at_ties(dtype):
    part = QuantizedRows.quantized(rows_with(np.float32([[127, 2.5, -3.5, 0.4, 448, 0]]), np.ones((1, 6), bool)), dtype)
    if dtype == INT8:
        scale = np.float32(448 / 127)
        np.testing.assert_array_equal(part.values, [36, 1, -1, 0, 127])
        assert scale <= part.row_scales[0] <= np.nextafter(scale, np.float32(9))
    else:
        assert part.row_scales[0] == 1
        np.testing.assert_array_equal(part.values.astype(np.float32), [128, 2.5, -3.5, 0.40625, 448])


def test_ties_go_to_even_numbers():
    part = QuantizedRows.quantized(rows_with(np.float32([[0.5, 1.5, 2.5, -2.5, 127]]), np.ones((1, 5), bool)), INT8)
    np.testing.assert_array_equal(part.values, [0, 2, 2, -2, 127])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 300), (3, 2, 5), (70_000,), (2, 65_536), (2, 65_537), (), (0, 4)], ids=str)
def test_entries_stay_where_they_were(shape, dtype):
    vector = random_array(shape, np.float32, 0)
    rows = Rows.cut(sparse_rows(None, vector, last=vector.size // 2), vector)
    part = QuantizedRows.quantized(rows, dtype)
    found = part.expanded()
    for name in ("offsets", "columns", "start"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))
        assert getattr(found, name).dtype == getattr(rows, name).dtype
    assert part.layout == QuantizedRows.planned(shape, rows.count, dtype, np.dtype(np.float32))
    assert part.lengths.dtype == (np.uint16 if rows_of(shape)[1] < 65_536 else np.uint32)


def test_rows_without_entries_have_scale_0():
    part = QuantizedRows.quantized(rows_with(np.float32([[1, 2], [3, 4], [5, 6]]), np.eye(3, 2, dtype=bool)), INT8)
    assert part.row_scales[2] == 0
    assert (part.row_scales[:2] > 0).all()


def test_an_entry_that_replaces_does_so_even_if_its_value_became_0():
    base, backbone = np.float32([[1, 2, 3, 4]]), np.float32([[10, 20, 30, 40]])
    rows = Rows.cut(rows_with(np.float32([[127, 0.1, 0, 5]]), np.array([[1, 1, 1, 0]], bool)), base)
    out, plain = poisoned((1, 4), np.float32), poisoned((1, 4), np.float32)
    QuantizedRows.quantized(rows, INT8).apply(backbone, 2.0, out=out)
    rows.apply(backbone, 2.0, out=plain)
    np.testing.assert_array_equal(plain, np.float32([[255, 2.2, 30, 40]]))
    np.testing.assert_array_equal(out, [[255, 2, 30, 40]])


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_are_refused(number):
    with pytest.raises(ShapeError, match="not finite"):
        QuantizedRows.quantized(rows_with(np.float32([[1, number]]), np.ones((1, 2), bool)), INT8)


def damaged(**arrays):
    part = QuantizedRows.quantized(rows_with(random_array((3, 4), np.float32, 0), np.ones((3, 4), bool)), FLOAT8_E4M3FN)
    given = {role: array.copy() for role, array in part.arrays.items()}
    for role, (index, number) in arrays.items():
        given[role][index] = number
    return QuantizedRows(**given, shape=(3, 4))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"row_scales": (1, -1)}, r"the scale of row 1 is -1.0, not a finite number of 0 or more"),
        ({"row_scales": (2, np.nan)}, "the scale of row 2 is nan"),
        ({"row_scales": (0, np.inf)}, "the scale of row 0 is inf"),
        ({"values": (5, np.nan)}, "a value is NaN"),
        ({"lengths": (1, 5)}, "lengths lead to 13 entries, there are 12"),
        ({"columns": (7, 4)}, "column 4 in rows 4 long"),
    ],
    ids=str,
)
def test_damage_is_named(arrays, said):
    part = damaged(**arrays)
    with pytest.raises(ShapeError, match=said):
        part.check()
    with pytest.raises(ShapeError, match=said):
        part.apply(np.zeros((3, 4), np.float32), 1.0, out=poisoned((3, 4), np.float32))
