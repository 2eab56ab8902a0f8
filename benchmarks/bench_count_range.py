import numpy as np
import pytest

from freemerge.kernels.count_range import count_range_reference


@pytest.mark.parametrize("shift", [21, 5])  # all there is; the few that lie about an order statistic
def test_count_range(throughput, version_of, weights, shift):
    base, (expert, *_) = weights
    arguments = (base, expert, [0 if shift == 21 else 0xBA83126F], [shift], 2048, True)
    run = version_of("count_range")
    result = throughput(lambda: run(*arguments), moved=2 * base.nbytes)
    np.testing.assert_array_equal(result, count_range_reference(*arguments))
