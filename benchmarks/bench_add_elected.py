import numpy as np

from freemerge.kernels.add_elected import add_elected_reference
from freemerge.kernels.array import task_vector


def test_add_elected(throughput, version_of, weights):
    base, experts = weights
    task_vectors = [task_vector(base, expert) for expert in experts]
    out, expected = np.empty_like(base), np.empty_like(base)
    arguments = (base, task_vectors, [0.8] * 3, 1.1, True)
    run = version_of("add_elected")
    throughput(lambda: run(*arguments, out), moved=2 * base.nbytes + 3 * task_vectors[0].nbytes)
    add_elected_reference(*arguments, expected)
    np.testing.assert_array_equal(out, expected)
