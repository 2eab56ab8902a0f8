import numpy as np

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_masked_vector import add_masked_vector_reference


def test_half_of_the_entries(throughput, version_of, weights):
    base, (vector, *_) = weights
    mask = pack_mask(np.random.default_rng(0).random(base.shape, np.float32) < 0.5)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_masked_vector")
    throughput(lambda: run(base, vector, mask, 0.8, out), moved=3 * base.nbytes + mask.nbytes)
    add_masked_vector_reference(base, vector, mask, 0.8, expected)
    np.testing.assert_array_equal(out, expected)
