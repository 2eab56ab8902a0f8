import numpy as np
import pytest

from freemerge.kernels.sparse_rows import sparse_rows_reference


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_one_percent(throughput, version_of, weights, scope):
    base, (expert, *_) = weights
    last = (base.shape[1] if scope == "row" else base.size) // 100
    run = version_of("sparse_rows")
    result = throughput(lambda: run(base, expert, 0, last, scope, None), moved=2 * base.nbytes)
    for got, expected in zip(result, sparse_rows_reference(base, expert, 0, last, scope, None), strict=True):
        np.testing.assert_array_equal(got, expected)
