import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.add_elected import add_elected, add_elected_reference
from freemerge.kernels.dispatch import implementation
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [0, 1, 127, 1024, 200_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n, normalize):
    base = random_array(n, dtype, seed=0)
    task_vectors = [random_array(n, dtype, seed=t) for t in (1, 2, 3)]
    weights = [0.8, 0.5, -0.3]
    expected, out = poisoned(n, dtype), poisoned(n, dtype)
    add_elected_reference(base, task_vectors, weights, 1.1, normalize, expected)
    implementation("add_elected", base)(base, task_vectors, weights, 1.1, normalize, out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(base_dtype, dtype, out_dtype):
    base, task_vectors = random_array(1500, base_dtype, seed=0), [random_array(1500, dtype, seed=t) for t in (1, 2)]
    expected, out = poisoned(1500, out_dtype), poisoned(1500, out_dtype)
    add_elected_reference(base, task_vectors, [0.5, 1.0], 0.7, True, expected)
    add_elected(base, task_vectors, [0.5, 1.0], scaling=0.7, normalize=True, out=out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


def test_the_election_by_hand():
    task_vectors = [np.array(column, np.float32) for column in ([3, 1, 0, -1], [-1, -2, 0, 1], [2, -2, 0, 0])]
    out = poisoned(4, np.float32)
    add_elected(np.zeros(4, np.float32), task_vectors, [1, 1, 1], scaling=1.0, normalize=False, out=out)
    assert out.tolist() == [5, -4, 0, 1]  # the last: the sum is 0, which elects +
    add_elected(np.zeros(4, np.float32), task_vectors, [1, 1, 1], scaling=1.0, normalize=True, out=out)
    assert out.tolist() == [2.5, -2, 0, 1]


def test_nan_is_never_elected():
    task_vectors = [np.array([np.nan, np.nan], np.float32), np.array([-2, 2], np.float32)]
    out, expected = poisoned(2, np.float32), poisoned(2, np.float32)
    add_elected_reference(np.ones(2, np.float32), task_vectors, [1, 1], 1.0, False, expected)
    add_elected(np.ones(2, np.float32), task_vectors, [1, 1], scaling=1.0, normalize=False, out=out)
    assert out.tolist() == expected.tolist() == [-1, 1]


def test_out_may_be_base():
    base, vector = random_array(5000, np.float32, seed=0), random_array(5000, np.float32, seed=1)
    expected = poisoned(5000, np.float32)
    add_elected(base, [vector], [0.4], scaling=1.0, normalize=False, out=expected)
    add_elected(base, [vector], [0.4], scaling=1.0, normalize=False, out=base)
    np.testing.assert_array_equal(base, expected)


def test_rejects_the_wrong_number_of_weights():
    with pytest.raises(ShapeError, match="1 weights for 2 task vectors"):
        add_elected(np.zeros(3), [np.zeros(3), np.zeros(3)], [1.0], scaling=1.0, normalize=False, out=np.zeros(3))
