import numpy as np

from freemerge.kernels._masks import pack_mask
from freemerge.kernels.add_masked import add_masked_reference


def test_elected_and_normalized(throughput, version_of, weights):
    base, experts = weights
    masks = [pack_mask(np.random.default_rng(t).random(base.size, np.float32) < 0.2) for t in range(3)]
    numbers = [1.0, 0.5, 0.5]
    arguments = (base, experts, masks, numbers, numbers, numbers, 0.0, 1.0)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_masked")
    throughput(lambda: run(*arguments, out), moved=5 * base.nbytes + 3 * masks[0].nbytes)
    add_masked_reference(*arguments, expected)
    np.testing.assert_array_equal(out, expected)
