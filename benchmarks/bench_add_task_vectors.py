import numpy as np

from freemerge.kernels.add_task_vectors import add_task_vectors_reference


def test_add_task_vectors(throughput, version_of, weights):
    base, experts = weights
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_task_vectors")
    throughput(lambda: run(base, experts, [0.3] * 3, out), moved=5 * base.nbytes)
    add_task_vectors_reference(base, experts, [0.3] * 3, expected)
    np.testing.assert_array_equal(out, expected)
