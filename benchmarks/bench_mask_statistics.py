import numpy as np

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.mask_statistics import mask_statistics_reference


def test_mask_statistics(throughput, version_of, weights):
    base, (expert, *_) = weights
    mask = pack_mask(np.random.default_rng(0).random(base.size, np.float32) < 0.5)
    run = version_of("mask_statistics")
    result = throughput(lambda: run(base, expert, mask), moved=2 * base.nbytes + mask.nbytes)
    np.testing.assert_allclose(result, mask_statistics_reference(base, expert, mask), rtol=1e-12)
