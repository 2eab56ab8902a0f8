import numpy as np

from freemerge.kernels.near_swap import near_swap_reference


def test_near_swap(throughput, version_of, weights):
    base, (expert, *_) = weights
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("near_swap")
    throughput(lambda: run(base, expert, 1e-3, out), moved=3 * base.nbytes)
    near_swap_reference(base, expert, 1e-3, expected)
    np.testing.assert_array_equal(out, expected)
