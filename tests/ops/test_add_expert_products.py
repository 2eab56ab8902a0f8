import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels import dispatch
from freemerge.kernels.add_expert_products import add_expert_products, add_expert_products_reference
from freemerge.kernels.array import BFLOAT16, SparseRows
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.testing import FLOATS, random_array

SCALES = [10.0, -0.5, 1.0, 3.0]


def some_experts(shape, count=4, density=0.1):
    """The second has no entry; others have rows without any."""
    experts = []
    for seed in range(count):
        dense = random_array(shape, np.float32, seed)
        dense[seed::5] = 0
        last = 0 if seed == 1 or not dense.size else max(1, int(dense.size * density))
        experts.append(sparse_rows(None, dense, last=last))
    return experts


def chosen(rows, experts, seed=0):
    """One expert or none for each row."""
    weights = np.zeros((rows, experts), np.float32)
    index = np.random.default_rng(seed).integers(-1, experts, rows)
    weights[np.flatnonzero(index >= 0), index[index >= 0]] = 1
    return weights


def mixed(rows, experts, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.random((rows, experts)).astype(np.float32)
    return np.where(rng.random(weights.shape) < 0.4, 0, weights).astype(np.float32)


def assert_matches_reference(x, experts, weights, out):
    expected = out.copy()
    arrays = [[getattr(rows, name) for rows in experts] for name in ("offsets", "columns", "values")]
    add_expert_products_reference(x, *arrays, SCALES, weights, expected)
    implementation("add_expert_products", x)(x, *arrays, SCALES, weights, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("weigh", [chosen, mixed])
@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [
        (1, 1, (7, 9)),
        (3, 1, (130, 300)),
        (5, 2, (64, 128)),
        (2, 33, (65, 129)),
        (6, 40, (200, 1037)),
        (70, 1, (1, 1)),
        (9, 3, (3, 70000)),
        (0, 1, (3, 4)),
        (3, 1, (0, 4)),
    ],
)
def test_compiled_version_matches_reference_bit_for_bit(rows, tokens, shape, weigh):
    n = rows * tokens
    x, out = random_array((n, shape[1]), np.float32, 1), random_array((n, shape[0]), np.float32, 2)
    if rows:
        assert_matches_reference(x, some_experts(shape), weigh(rows, 4), out)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    x, out = random_array((45, 30), dtype, 1), random_array((45, 20), out_dtype, 2)
    assert_matches_reference(x, some_experts((20, 30)), mixed(15, 4), out)


def test_is_the_dense_product():
    experts, weights = some_experts((40, 60)), mixed(12, 4)
    x, out = random_array((12, 60), np.float32, 1), random_array((12, 40), np.float32, 2)
    dense = np.stack([scale * rows.to_dense().astype(np.float64) for rows, scale in zip(experts, SCALES, strict=True)])
    expected = out + np.einsum("te,ehw,tw->th", weights, dense, x)
    add_expert_products(x, experts, SCALES, weights, out=out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)  # some 25 terms of size 10 in float32


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_token_has_the_same_bits_in_any_company(threads):
    experts, x = some_experts((300, 500)), random_array((150, 500), BFLOAT16, 1)
    out, weights = random_array((150, 300), BFLOAT16, 2), chosen(150, 4)
    together = out.copy()
    before = dispatch.threads()
    dispatch.set_threads(threads)
    try:
        add_expert_products(x, experts, SCALES, weights, out=together)
    finally:
        dispatch.set_threads(before)
    for token in range(0, 150, 7):
        alone = out[token : token + 1].copy()
        add_expert_products(x[token : token + 1], experts, SCALES, weights[token : token + 1], out=alone)
        assert alone.tobytes() == together[token : token + 1].tobytes()


def test_who_has_no_expert_keeps_every_bit():
    out = np.full((3, 4), -0.0, np.float32)
    out[1] = np.nan
    before, x = out.copy(), np.full((3, 5), np.inf, np.float32)
    add_expert_products(x, some_experts((4, 5)), SCALES, np.zeros((3, 4), np.float32), out=out)
    assert out.tobytes() == before.tobytes()
    add_expert_products(x, [], [], np.zeros((3, 0), np.float32), out=out)
    assert out.tobytes() == before.tobytes()


def test_an_expert_of_weight_zero_is_not_looked_at():
    rows = SparseRows(np.array([0, 1]), np.array([0], np.uint16), np.array([np.nan], np.float32), (1, 2))
    good = SparseRows(np.array([0, 1]), np.array([1], np.uint16), np.array([2], np.float32), (1, 2))
    out, x = np.zeros((2, 1), np.float32), np.array([[np.inf, 3], [1, 4]], np.float32)
    add_expert_products(x, [rows, good], [1, 1], np.array([[0, 1], [0, 0.5]], np.float32), out=out)
    assert out.tolist() == [[6], [4]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((6, 4), np.float32)}, r"sparse rows of \[3, 5\]"),
        ({"x": np.zeros((5, 5), np.float32)}, "not \\[n, width\\] and \\[n, H\\]"),
        ({"x": np.zeros((6, 5), np.int32)}, "not a float type"),
        ({"scales": [1.0]}, "1 scales for 4 experts"),
        ({"weights": np.zeros((6, 3), np.float32)}, "weights are float32"),
        ({"weights": np.zeros((6, 4))}, "weights are float64"),
        ({"weights": np.zeros((4, 4), np.float32)}, "4 rows of weights for 6 tokens"),
        ({"weights": np.zeros((0, 4), np.float32)}, "0 rows of weights for 6 tokens"),
    ],
)
def test_rejects_what_does_not_fit(changed, message):
    given = {"x": np.zeros((6, 5), np.float32), "scales": SCALES, "weights": np.zeros((6, 4), np.float32)} | changed
    out = np.zeros((6, 3), np.float32)
    with pytest.raises(ShapeError, match=message):
        add_expert_products(given["x"], some_experts((3, 5)), given["scales"], given["weights"], out=out)
