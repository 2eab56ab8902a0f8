import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.magnitude_mask import magnitude_mask_reference
from freemerge.kernels.magnitude_threshold import magnitude_threshold


def test_twenty_percent_of_a_tensor(throughput, version_of, weights):
    base, (expert, *_) = weights
    lower = magnitude_threshold([base], [expert], base.size // 5)
    out, expected = empty_mask(base), empty_mask(base)
    run = version_of("magnitude_mask")
    throughput(lambda: run(base, expert, lower, None, out), moved=4 * base.nbytes + out.nbytes)  # two sweeps over both
    magnitude_mask_reference(base, expert, lower, None, expected)
    np.testing.assert_array_equal(out, expected)
