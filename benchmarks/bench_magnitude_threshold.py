import numpy as np

from freemerge.kernels.magnitude_threshold import magnitude_threshold_reference


def test_one_percent_of_a_tensor(throughput, version_of, weights):
    base, (expert, *_) = weights
    rank = base.size // 100
    run = version_of("magnitude_threshold")
    result = throughput(lambda: run([base], [expert], rank, "model"), moved=4 * base.nbytes)  # two sweeps over both
    assert result == magnitude_threshold_reference([base], [expert], rank, "model")


def test_one_percent_of_each_row(throughput, version_of, weights):
    base, (expert, *_) = weights
    rank = base.shape[1] // 100
    run = version_of("magnitude_threshold")
    result = throughput(lambda: run([base], [expert], rank, "row"), moved=2 * base.nbytes)
    np.testing.assert_array_equal(result, magnitude_threshold_reference([base], [expert], rank, "row"))
