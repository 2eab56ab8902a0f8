import numpy as np

from freemerge.kernels.fusion_importance import fusion_importance_reference


def test_fusion_importance(throughput, version_of, weights):
    base, (expert, *_) = weights
    out, expected = np.empty(base.shape, np.float32), np.empty(base.shape, np.float32)
    run = version_of("fusion_importance")
    throughput(lambda: run(base, expert, out), moved=2 * base.nbytes + out.nbytes)
    fusion_importance_reference(base, expert, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-3)  # a divergence of some 1e-6 of what it is the difference of
