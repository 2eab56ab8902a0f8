import numpy as np
import pytest

from freemerge.kernels.dot_products import dot_products_reference


@pytest.mark.parametrize("lines", ["tensor", "row", "column"])
def test_dot_products(throughput, version_of, weights, lines):
    base, experts = weights
    run = version_of("dot_products")
    result = throughput(lambda: run(base, experts, lines), moved=4 * base.nbytes)
    np.testing.assert_allclose(result, dot_products_reference(base, experts, lines), rtol=1e-6, atol=1e-9)
