import numpy as np

from freemerge.kernels.task_vector_statistics import task_vector_statistics_reference


def test_task_vector_statistics(throughput, version_of, weights):
    base, experts = weights
    run = version_of("task_vector_statistics")
    result = throughput(lambda: run(base, experts), moved=6 * base.nbytes)  # the base once for each expert
    np.testing.assert_array_equal(result, task_vector_statistics_reference(base, experts))
