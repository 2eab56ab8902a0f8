"""The largest weights of a row, divided by their sum; of arrays and of tensors alike."""

import numpy as np
import pytest

from freemerge.top_k import keep_top_k

torch = pytest.importorskip("torch")

ROWS = np.array([[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0], [0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
        (2, [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
        (3, [[1 / 9, 4 / 9, 4 / 9, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
        (4, ROWS),
        (9, ROWS),
    ],
)
def test_the_first_of_equals_is_kept(top_k, expected):
    given = ROWS.copy()
    # one division in float32
    np.testing.assert_allclose(keep_top_k(given, top_k), expected, rtol=2e-7)
    np.testing.assert_array_equal(keep_top_k(torch.from_numpy(given), top_k).numpy(), keep_top_k(given, top_k))
    np.testing.assert_array_equal(given, ROWS)


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_tensors_are_as_arrays(top_k):
    weights = np.random.default_rng(0).integers(0, 4, (200, 6)).astype(np.float32)  # many equals
    found = keep_top_k(torch.from_numpy(weights), top_k).numpy()
    # sums of six small numbers, in another order
    np.testing.assert_allclose(found, keep_top_k(weights, top_k), rtol=3e-7)
    assert (np.count_nonzero(found, axis=1) <= top_k).all()
