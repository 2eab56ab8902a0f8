import numpy as np

from freemerge.kernels.task_vector_variance import task_vector_variance_reference


def test_task_vector_variance(throughput, version_of, weights):
    base, experts = weights
    out, expected = np.empty(base.shape, np.float32), np.empty(base.shape, np.float32)
    run = version_of("task_vector_variance")
    throughput(lambda: run(base, experts, out), moved=4 * base.nbytes + out.nbytes)
    task_vector_variance_reference(base, experts, expected)
    np.testing.assert_array_equal(out, expected)
