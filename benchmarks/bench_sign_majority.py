from freemerge.kernels.sign_majority import sign_majority_reference


def test_sign_majority(throughput, version_of, weights):
    base, experts = weights
    arguments = (base, experts, [1e-3] * len(experts))
    run = version_of("sign_majority")
    result = throughput(lambda: run(*arguments), moved=(1 + len(experts)) * base.nbytes)
    assert result == sign_majority_reference(*arguments)
