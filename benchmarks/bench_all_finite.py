import numpy as np

from freemerge.kernels.all_finite import all_finite_reference


def test_all_finite(throughput, version_of, weights):
    base, _ = weights
    run = version_of("all_finite")
    assert throughput(lambda: run(base), moved=base.nbytes)
    assert all_finite_reference(base)
    broken = base.copy()
    broken.reshape(-1)[-1] = np.nan
    assert not run(broken)
