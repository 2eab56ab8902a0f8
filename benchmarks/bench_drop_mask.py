import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.drop_mask import drop_mask_reference

KEY = (1, 2)


def test_constant_probability(throughput, version_of, weights):
    base, (expert, *_) = weights
    out, expected = empty_mask(base), empty_mask(base)
    run = version_of("drop_mask")
    throughput(lambda: run(base, expert, 0.5, 0.0, KEY, out), moved=out.nbytes)  # arithmetic, and little else
    drop_mask_reference(base, expert, 0.5, 0.0, KEY, expected)
    np.testing.assert_array_equal(out, expected)


def test_probability_by_rank(throughput, version_of, weights):
    base, (expert, *_) = weights
    out, expected = empty_mask(base), empty_mask(base)
    run = version_of("drop_mask")
    throughput(lambda: run(base, expert, 0.5, 0.15, KEY, out), moved=2 * base.nbytes + out.nbytes)
    drop_mask_reference(base, expert, 0.5, 0.15, KEY, expected)
    np.testing.assert_array_equal(out, expected)
