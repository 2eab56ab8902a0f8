import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels import dispatch
from freemerge.kernels.high_pass_magnitudes import high_pass_magnitudes, high_pass_magnitudes_reference
from freemerge.testing import FLOATS, random_array

SHAPES = [(1, 1), (1, 300), (300, 1), (31, 37), (64, 64), (100, 40), (40, 134), (256, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype, shape):
    base, experts = random_array(shape, dtype, seed=0), [random_array(shape, dtype, seed=t) for t in (1, 2, 3)]
    for mask in ((0.7, "min", "official"), (0.95, "max", "clean"), (0.7, "diagonal", "clean")):
        expected = high_pass_magnitudes_reference(base, experts, *mask)
        cutoff, radius_from, inner_ring = mask
        actual = high_pass_magnitudes(base, experts, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring)
        # errors of single elements are 1e-6 of the largest at most, and average out in the sum
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * experts[0].size)


def test_without_base_the_experts_are_task_vectors():
    task_vector = random_array((50, 120), np.float32, seed=0)
    expected = high_pass_magnitudes_reference(np.zeros_like(task_vector), [task_vector], 0.7, "min", "clean")
    np.testing.assert_allclose(high_pass_magnitudes(None, [task_vector]), expected, rtol=1e-6)


def test_same_bits_for_any_number_of_threads():
    for shape in ((200, 200), (64, 400), (400, 64)):
        experts = [random_array(shape, np.float32, seed=1)]
        results = []
        for threads in (1, 2, 5):
            dispatch.set_threads(threads)
            results.append(high_pass_magnitudes(None, experts))
        dispatch.set_threads(0)
        assert results[0] == results[1] == results[2]


def test_an_expert_does_not_depend_on_its_neighbours():
    base, experts = (
        random_array((60, 150), np.float32, seed=0),
        [random_array((60, 150), np.float32, seed=t) for t in (1, 2, 3)],
    )
    together = high_pass_magnitudes(base, experts)
    np.testing.assert_array_equal(together, [high_pass_magnitudes(base, [expert])[0] for expert in experts])


def test_an_expert_like_the_base_is_zero():
    base = random_array((60, 150), np.float32, seed=0)
    assert high_pass_magnitudes(base, [base]) == [0]


def test_no_experts_and_zero_size():
    assert high_pass_magnitudes(np.zeros((3, 4)), []).shape == (0,)
    np.testing.assert_array_equal(high_pass_magnitudes(np.zeros((0, 4)), [np.zeros((0, 4))]), [0])


def test_rejects_another_shape():
    with pytest.raises(ShapeError, match="base is"):
        high_pass_magnitudes(np.zeros((3, 4)), [np.zeros((4, 3))])
