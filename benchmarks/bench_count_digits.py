import numpy as np
import pytest

from freemerge.kernels.count_digits import count_digits_reference


@pytest.mark.parametrize("below", [21, 10])  # the first digit, of all entries; the second, of those that begin alike
def test_count_digits(throughput, version_of, weights, below):
    base, (expert, *_) = weights
    arguments = (base, expert, 0xB9800000, below, 11, True)
    run = version_of("count_digits")
    result = throughput(lambda: run(*arguments), moved=2 * base.nbytes)
    np.testing.assert_array_equal(result, count_digits_reference(*arguments))
