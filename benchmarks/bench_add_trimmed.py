import numpy as np

from freemerge.kernels.add_trimmed import add_trimmed_reference


def test_add_trimmed(throughput, version_of, weights):
    base, experts = weights
    arguments = (base, experts, [1e-3] * len(experts), 1, "mean", 1.0)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_trimmed")
    throughput(lambda: run(*arguments, out), moved=(2 + len(experts)) * base.nbytes)
    add_trimmed_reference(*arguments, expected)
    np.testing.assert_array_equal(out, expected)
