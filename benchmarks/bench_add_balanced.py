import numpy as np

from freemerge.kernels.add_balanced import add_balanced_reference


def test_add_balanced(throughput, version_of, weights):
    base, experts = weights
    numbers = ([value] * len(experts) for value in (0.0, 1e-2, 1e-6, 1e-3, 1.0))
    arguments = (base, experts, *numbers, False)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("add_balanced")
    throughput(lambda: run(*arguments, out), moved=(2 + len(experts)) * base.nbytes)
    add_balanced_reference(*arguments, expected)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=1 / 128)  # an ulp of bfloat16
