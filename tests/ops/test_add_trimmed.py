import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_trimmed import COMBINATIONS, add_trimmed, add_trimmed_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array

FLOORS = [0.8, 0.0, 1.5]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n, combination):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    for zeros in (-1, 0, 1):
        expected, out = poisoned(n, dtype), poisoned(n, dtype)
        add_trimmed_reference(base, experts, FLOORS, zeros, combination, 0.7, expected)
        implementation("add_trimmed", base)(base, experts, FLOORS, zeros, combination, 0.7, out)
        np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(out_dtype):
    base, *experts = (random_array(1500, dtype, seed=t) for t, dtype in enumerate(FLOATS))
    floors, expected, out = [0.5] * len(experts), poisoned(1500, out_dtype), poisoned(1500, out_dtype)
    add_trimmed_reference(base, experts, floors, 1, "mean", 1.0, expected)
    add_trimmed(base, experts, floors, zeros=1, out=out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(
    ("zeros", "combination", "expected"),
    [
        (1, "mean", [2.5, -3, 2, 0]),
        (1, "sum", [5, -3, 2, 0]),
        (1, "max", [3, -3, 2, 0]),
        (-1, "mean", [2.5, -3, -2, 0]),
        (-1, "max", [3, -3, -2, 0]),
        (0, "sum", [5, -3, -2, 0]),
        (0, "max", [3, -3, 0, 0]),
    ],
)
def test_by_hand(zeros, combination, expected):
    base = np.ones(4, np.float32)
    experts = [base + np.array(column, np.float32) for column in ([3, 1, 2, 1], [-2, -3, -2, 1], [2, 1, 1, -1])]
    out = poisoned(4, np.float32)
    add_trimmed(base, experts, [2.0, 2.0, 2.0], zeros=zeros, combination=combination, out=out)  # trims what is 1
    assert (out - base).tolist() == expected


def test_out_may_be_base():
    base, *experts = (random_array(5000, np.float32, seed=t) for t in range(4))
    expected = poisoned(5000, np.float32)
    add_trimmed(base, experts, FLOORS, zeros=1, out=expected)
    add_trimmed(base, experts, FLOORS, zeros=1, out=base)
    np.testing.assert_array_equal(base, expected)


def test_rejects_what_does_not_fit():
    base = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match="1 floors for 2 experts"):
        add_trimmed(base, [base, base], [0.0], zeros=1, out=base)
    with pytest.raises(ShapeError, match="zeros 2"):
        add_trimmed(base, [base], [0.0], zeros=2, out=base)
