import numpy as np
import pytest
import torch

from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import BFLOAT16, SparseRows
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu

LARGE = (3000, 700) if torch.cuda.is_available() else (30, 700)
SHAPES = [(0,), (1,), (1009,), (0, 5), (5, 0), (1009, 1), LARGE, (3, 5, 7), ()]


def some_rows(shape, seed=7, share=0.1):
    expert = np.asarray(random_array(shape, np.float32, seed))
    rows = sparse_rows(None, expert, last=max(min(1, expert.size), int(expert.size * share)))
    rows.values[::5] = 0.0
    return rows


def on_gpu(rows):
    return SparseRows(to_gpu(rows.offsets), to_gpu(rows.columns), to_gpu(rows.values), rows.shape)


def assert_matches_cpu(array, rows, scale, start, out_dtype):
    expected, out = poisoned(array.shape, out_dtype), to_gpu(poisoned(array.shape, out_dtype))
    apply_sparse_rows(array, rows, scale, start=start, out=expected)
    apply_sparse_rows(to_gpu(array), on_gpu(rows), scale, start=None if start is None else to_gpu(start), out=out)
    np.testing.assert_array_equal(from_gpu(out).ravel().view(np.uint8), expected.ravel().view(np.uint8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_cpu(shape, dtype):
    array, rows = np.asarray(random_array(shape, dtype, seed=0)), some_rows(shape)
    assert_matches_cpu(array, rows, -1.7, None, dtype)
    assert_matches_cpu(array, rows, -1.7, random_array(rows.count, dtype, seed=1), dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "start_dtype"),
    [*((dtype, None) for dtype in FLOATS), (BFLOAT16, np.float64), (np.float64, BFLOAT16)],
    ids=str,
)
def test_mixtures_of_dtypes(dtype, start_dtype, out_dtype):
    array, rows = random_array((20, 50), dtype, seed=0), some_rows((20, 50))
    start = None if start_dtype is None else random_array(rows.count, start_dtype, seed=1)
    assert_matches_cpu(array, rows, 0.3, start, out_dtype)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOATS[4]], ids=str)
def test_in_place_touches_only_entries_that_are_not_zero(dtype, replace):
    array, rows = random_array((30, 70), dtype, seed=0), some_rows((30, 70))
    start = random_array(rows.count, dtype, seed=1) if replace else None
    expected, tensor = poisoned(array.shape, dtype), to_gpu(array)
    apply_sparse_rows(array, rows, 2.0, start=start, out=expected)
    apply_sparse_rows(tensor, on_gpu(rows), 2.0, start=None if start is None else to_gpu(start), out=tensor)
    np.testing.assert_array_equal(from_gpu(tensor).view(np.uint8), expected.view(np.uint8))


def test_rows_without_entries_and_one_with_all():
    array, width = random_array((40, 600), BFLOAT16, seed=0), 600
    offsets = np.where(np.arange(41) > 17, width, 0)
    rows = SparseRows(offsets, np.arange(width, dtype=np.uint16), random_array(width, np.float32, seed=1), (40, width))
    assert_matches_cpu(array, rows, 1.0, None, BFLOAT16)


def test_columns_of_32_bits():
    array = np.zeros((2, 65_540), np.float32)
    rows = SparseRows(np.array([0, 1, 3]), np.array([7, 0, 65_539], np.uint32), np.ones(3, np.float32), array.shape)
    assert_matches_cpu(array, rows, 1.0, None, np.float32)


def test_value_zero_is_no_entry():
    tensor = to_gpu(np.array([1.0, 2.0], np.float32))
    rows = SparseRows(np.array([0, 2]), np.array([0, 1], np.uint16), np.array([0.0, 0.5], np.float32), (2,))
    apply_sparse_rows(tensor, on_gpu(rows), 2.0, start=to_gpu(np.array([10.0, 20.0], np.float32)), out=tensor)
    assert tensor.tolist() == [1.0, 21.0]


def test_signed_zeros_survive_the_copy():
    out = to_gpu(poisoned(2, BFLOAT16))
    nothing = SparseRows(np.zeros(2, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.float32), (2,))
    apply_sparse_rows(to_gpu(np.array([-0.0, 1.0], np.float32)), on_gpu(nothing), 1.0, out=out)
    assert torch.signbit(out).tolist() == [True, False]


def test_puts_back_what_sparse_rows_took():
    base, expert = (to_gpu(random_array((20, 300), np.float32, seed)) for seed in (0, 1))
    apply_sparse_rows(base, sparse_rows(base, expert, last=6000), 1.0, out=base)
    # a float32 difference added back: within a rounding of the larger operand
    np.testing.assert_allclose(from_gpu(base), from_gpu(expert), rtol=1e-6, atol=1e-6)
