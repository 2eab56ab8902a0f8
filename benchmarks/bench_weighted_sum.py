import numpy as np

from freemerge.kernels.weighted_sum import weighted_sum_reference


def test_weighted_sum(throughput, version_of, weights):
    _, experts = weights
    out, expected = np.empty_like(experts[0]), np.empty_like(experts[0])
    run = version_of("weighted_sum")
    throughput(lambda: run(experts, [1 / 3] * 3, out), moved=4 * out.nbytes)
    weighted_sum_reference(experts, [1 / 3] * 3, expected)
    np.testing.assert_array_equal(out, expected)
