import numpy as np
import pytest

from freemerge.kernels.add_expert_products import add_expert_products
from freemerge.kernels.array import BFLOAT16, SparseRows
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

SCALES = [10.0, -0.5, 1.0]


def some_experts(shape):
    """The second has no entry; others have rows without any."""
    experts = []
    for seed in range(3):
        dense = random_array(shape, np.float32, seed)
        dense[seed::5] = 0
        experts.append(sparse_rows(None, dense, last=0 if seed == 1 else max(1, dense.size // 10)))
    return experts


def some_weights(rows):
    weights = np.random.default_rng(0).random((rows, 3)).astype(np.float32)
    weights[weights < 0.4] = 0
    weights[::4] = 0
    weights[1::4] = [0, 0, 1]
    return weights


def on_gpu(rows):
    return SparseRows(*(to_gpu(a) for a in (rows.offsets, rows.columns, rows.values)), rows.shape)


def assert_matches_cpu(x, out, experts, weights):
    tensor = to_gpu(out)
    add_expert_products(to_gpu(x), [on_gpu(rows) for rows in experts], SCALES, to_gpu(weights), out=tensor)
    before = out.copy()
    add_expert_products(x, experts, SCALES, weights, out=out)
    found, expected = from_gpu(tensor).astype(np.float64), out.astype(np.float64)
    # sums of some terms of size 10 in another order, then a rounding to the dtype of out
    step = {8: 0, 4: 1e-6, 2: 2**-7, 1: 2**-2}[out.dtype.itemsize]
    np.testing.assert_allclose(found, expected, rtol=step, atol=2e-4)
    idle = np.repeat(~weights.any(axis=1), len(x) // len(weights))
    assert from_gpu(tensor)[idle].tobytes() == before[idle].tobytes()


@pytest.mark.parametrize(("rows", "tokens", "shape"), [(1, 1, (7, 9)), (6, 3, (65, 129)), (4, 2, (40, 500))])
def test_matches_cpu(rows, tokens, shape):
    x, out = (random_array((rows * tokens, n), np.float32, seed) for seed, n in ((1, shape[1]), (2, shape[0])))
    assert_matches_cpu(x, out, some_experts(shape), some_weights(rows))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    x, out = random_array((8, 30), dtype, 1), random_array((8, 20), dtype, 2)
    assert_matches_cpu(x, out, some_experts((20, 30)), some_weights(8))


def test_columns_of_32_bits_and_tensors_without_experts():
    x, out = random_array((4, 65_540), BFLOAT16, 1), random_array((4, 2), BFLOAT16, 2)
    rows = SparseRows(np.array([0, 1, 3]), np.array([7, 0, 65_539], np.uint32), np.ones(3, np.float32), (2, 65_540))
    assert_matches_cpu(x, out, [rows, rows, rows], some_weights(4))
    tensor, before = to_gpu(out), to_gpu(out)
    add_expert_products(to_gpu(x), [], [], to_gpu(np.zeros((4, 0), np.float32)), out=tensor)
    assert from_gpu(tensor).tobytes() == from_gpu(before).tobytes()
