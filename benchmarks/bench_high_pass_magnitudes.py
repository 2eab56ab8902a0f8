"""The mean magnitudes that align needs: every expert filtered by itself, nothing stored."""

import numpy as np
import pytest

from conftest import checkpoint
from freemerge.kernels.high_pass_magnitudes import high_pass_magnitudes, high_pass_magnitudes_reference
from shapes import FILTERED


@pytest.mark.parametrize("shape", FILTERED, ids=str)
def test_high_pass_magnitudes(benchmark, throughput, shape):
    base, experts = checkpoint(shape)
    sums = throughput(lambda: high_pass_magnitudes(base, experts), moved=4 * base.nbytes)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_element"] = round(benchmark.stats.stats.median / np.prod(shape) * 1e9, 2)
    if shape == FILTERED[0]:
        np.testing.assert_allclose(sums, high_pass_magnitudes_reference(base, experts, 0.7, "min", "clean"), rtol=1e-6)
