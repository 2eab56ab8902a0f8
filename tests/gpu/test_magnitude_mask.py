import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.magnitude_mask import magnitude_mask, magnitude_mask_reference
from freemerge.kernels.magnitude_threshold import Threshold, magnitude_threshold
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu

ON_A_GPU = torch.cuda.is_available()
MANY = 200_003 if ON_A_GPU else 4_107


@pytest.fixture(autouse=not ON_A_GPU, scope="module")
def _short_segments():
    """Several segments in the few entries the interpreter gets through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freemerge.kernels.triton.magnitude_mask.SEGMENT", 2048)
        yield


def tied(shape, dtype, seed):
    """Few distinct values, like the task vectors of bfloat16 checkpoints."""
    return np.asarray(np.random.default_rng(seed).integers(-3, 4, shape)).astype(dtype)


def there(threshold):
    return threshold and Threshold(*map(to_gpu, threshold))


def assert_matches_reference(base, expert, lower, upper, move=there):
    expected, out = empty_mask(expert), to_gpu(np.full_like(empty_mask(expert), 0xAA))
    magnitude_mask_reference(base, expert, lower, upper, expected)
    tensors = None if base is None else to_gpu(base), to_gpu(expert)
    magnitude_mask(*tensors, move(lower), move(upper), out=out)
    np.testing.assert_array_equal(from_gpu(out), expected)


def thresholds(base, expert, first, last, scope="model"):
    return [magnitude_threshold([base], [expert], rank, scope=scope) for rank in (last, first)]


@pytest.mark.parametrize("n", [0, 1, 2, MANY])
@pytest.mark.parametrize("make", [random_array, tied])
def test_a_tensor(make, n):
    base, expert = make(n, BFLOAT16, seed=0), make(n, BFLOAT16, seed=1)
    for first, last in [(0, 0), (n // 50, n // 2), (n // 3, n // 3 + min(n, 1)), (0, n)]:
        lower, upper = thresholds(base, expert, first, last)
        assert_matches_reference(base, expert, lower, upper)
    assert_matches_reference(None, expert, lower, None)
    lower, _ = thresholds(None, expert, 0, n // 3)
    assert_matches_reference(None, expert, lower, None)


@pytest.mark.parametrize("shape", [(1, 1009), (9, 1), (2, 1304), (0, 5), (5, 0), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("make", [random_array, tied])
def test_rows(make, shape):
    base, expert = (make(shape, BFLOAT16, seed=seed) for seed in (0, 1))
    width = shape[-1]
    for first, last in [(width // 20, width // 3), (0, width)]:
        lower, upper = thresholds(base, expert, first, last, "row")
        assert_matches_reference(base, expert, lower, upper)
    assert_matches_reference(None, expert, lower, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    base, expert = random_array(700, dtype, seed=0), random_array(700, np.float32, seed=1)
    for pair in ((base, expert), (expert, base), (None, base)):
        assert_matches_reference(*pair, *thresholds(*pair, 50, 300))


@pytest.mark.parametrize("ties", [0, 1, 3, 4, 9])
def test_thresholds_of_the_host(ties):
    expert = np.array([2, 1, -2, 3, np.nan, 2, 0], np.float32)
    for value in (2.0, 0.0):
        lower = Threshold(np.array([value], np.float32), np.array([ties]))
        assert_matches_reference(None, expert, lower, None, move=lambda threshold: threshold)
    rows = Threshold(np.array([1, 2], np.float32), np.array([ties, 1]))
    assert_matches_reference(None, np.stack([expert, expert[::-1]]), rows, None, move=lambda threshold: threshold)


@settings(derandomize=True, deadline=None, max_examples=100 if ON_A_GPU else 15)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, np.inf, np.nan, 1e-40]), min_size=1, max_size=40), st.data())
def test_exactly_the_ranks_asked_for(values, data):
    expert = np.array(values, np.float32)
    last = data.draw(st.integers(0, len(values)))
    first = data.draw(st.integers(0, last))
    assert_matches_reference(None, expert, *thresholds(None, expert, first, last))
