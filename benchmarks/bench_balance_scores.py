import numpy as np

from freemerge.kernels.balance_scores import balance_scores_reference


def test_balance_scores(throughput, version_of, weights):
    base, experts = weights
    arguments = (base, experts, [0.0] * len(experts), [1e-2] * len(experts), False)
    out, expected = (np.empty((len(experts), base.size), np.float32) for _ in range(2))
    run = version_of("balance_scores")
    throughput(lambda: run(*arguments, out), moved=(1 + len(experts)) * base.nbytes + out.nbytes)
    balance_scores_reference(*arguments, expected)
    np.testing.assert_allclose(out, expected, rtol=3e-6, atol=1e-12)  # e^x and tanh of a few ulps
