from freemerge.kernels.count_magnitudes import count_magnitudes_reference


def test_count_magnitudes(throughput, version_of, weights):
    base, (expert, *_) = weights
    run = version_of("count_magnitudes")
    result = throughput(lambda: run(base, expert, 0.002), moved=2 * base.nbytes)
    assert result == count_magnitudes_reference(base, expert, 0.002)
