import numpy as np
import pytest

from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import SparseRows
from freemerge.kernels.put_entries import put_entries
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, from_gpu, poisoned, random_array, to_gpu


def some_rows(shape):
    return sparse_rows(None, random_array(shape, np.float32, 7), last=max(1, int(np.prod(shape)) // 10))


def on_gpu(rows):
    return SparseRows(*(to_gpu(a) for a in (rows.offsets, rows.columns, rows.values)), rows.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1009,), (1, 700), (30, 70), (3, 5, 7)], ids=str)
def test_matches_cpu(shape, dtype):
    array, rows = random_array(shape, dtype, seed=0), some_rows(shape)
    entries, tensor = random_array((rows.count,), dtype, seed=1), to_gpu(array)
    put_entries(array, rows, entries)
    put_entries(tensor, on_gpu(rows), to_gpu(entries))
    assert from_gpu(tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gives_back_what_apply_sparse_rows_took_bit_for_bit(dtype):
    array, rows = random_array((30, 70), dtype, seed=0), some_rows((30, 70))
    array[::3] = -0.0
    if dtype.itemsize > 1:  # a float8 array goes by float32 and back, where all NaN become one
        array[1::3, ::2] = np.nan
    tensor, kept = to_gpu(array), to_gpu(poisoned(rows.count, dtype))
    apply_sparse_rows(tensor, on_gpu(rows), 2.0, out=tensor, kept=kept)
    assert from_gpu(tensor).tobytes() != array.tobytes()
    put_entries(tensor, on_gpu(rows), kept)
    assert from_gpu(tensor).tobytes() == array.tobytes()
