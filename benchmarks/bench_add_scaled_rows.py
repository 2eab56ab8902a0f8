import numpy as np
import pytest

from freemerge.kernels.add_scaled_rows import add_scaled_rows_reference


@pytest.mark.parametrize("lines", ["row", "column"])
def test_add_scaled_rows(throughput, version_of, weights, lines):
    base, experts = weights
    numbers = np.random.default_rng(0).random((3, base.shape[lines == "column"]), np.float32)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_scaled_rows")
    throughput(lambda: run(base, experts, numbers, lines, out), moved=5 * base.nbytes)
    add_scaled_rows_reference(base, experts, numbers, lines, expected)
    np.testing.assert_array_equal(out, expected)
