import numpy as np
import pytest

from attached_models import random_rows
from freemerge.kernels.add_expert_products import add_expert_products_reference
from freemerge.kernels.array import BFLOAT16

EXPERTS = 8


@pytest.mark.parametrize("tokens", [1, 8, 1024])
def test_one_percent_of_eight_experts(throughput, version_of, shape, tokens):
    """Of as many tokens, an eighth each. Bytes: the entries of an expert for each 32 of its tokens, x and out."""
    rng, (height, width) = np.random.default_rng(0), shape
    experts = [random_rows(shape, 0.01, seed) for seed in range(EXPERTS)]
    arrays = [[getattr(rows, name) for rows in experts] for name in ("offsets", "columns", "values")]
    x, out = (rng.standard_normal((tokens, n), np.float32).astype(BFLOAT16) for n in (width, height))
    weights = np.eye(EXPERTS, dtype=np.float32)[np.arange(tokens) * EXPERTS // tokens]
    run, expected = version_of("add_expert_products"), out.copy()
    add_expert_products_reference(x, *arrays, [5.0] * EXPERTS, weights, expected)
    first = out.copy()
    run(x, *arrays, [5.0] * EXPERTS, weights, first)
    np.testing.assert_array_equal(first, expected)
    visits = max(1, tokens // (32 * EXPERTS)) * min(tokens, EXPERTS)
    moved = visits * experts[0].count * 6 + x.nbytes + 2 * out.nbytes
    throughput(lambda: run(x, *arrays, [5.0] * EXPERTS, weights, out), moved)
