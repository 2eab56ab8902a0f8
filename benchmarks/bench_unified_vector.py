import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.unified_vector import unified_vector_reference


def test_three_experts(throughput, version_of, weights):
    base, experts = weights
    out, expected = np.empty_like(base), np.empty_like(base)
    masks, wanted = ([empty_mask(base) for _ in experts] for _ in range(2))
    run = version_of("unified_vector")
    throughput(lambda: run(base, experts, masks, out), moved=5 * base.nbytes + 3 * masks[0].nbytes)
    unified_vector_reference(base, experts, wanted, expected)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(masks, wanted)
