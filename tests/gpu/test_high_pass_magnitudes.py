import numpy as np
import pytest

from freemerge.kernels._high_pass_gpu_plan import possible_gpu_plans
from freemerge.kernels.high_pass_magnitudes import high_pass_magnitudes, high_pass_magnitudes_reference
from freemerge.testing import FLOATS, from_gpu, random_array, to_gpu


def magnitudes(base, experts, **mask):
    return from_gpu(high_pass_magnitudes(None if base is None else to_gpu(base), list(map(to_gpu, experts)), **mask))


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (31, 37), (64, 33), (33, 64), (96, 97), (137, 139)], ids=str)
def test_matches_reference(shape):
    base, *experts = (random_array(shape, np.float32, seed=t) for t in range(3))
    for mask in ((0.7, "min", "official"), (0.95, "max", "clean"), (0.7, "diagonal", "clean")):
        cutoff, radius_from, inner_ring = mask
        expected = high_pass_magnitudes_reference(base, experts, *mask)
        actual = magnitudes(base, experts, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring)
        assert actual.dtype == np.float64
        # errors of single elements are 1e-6 of the largest at most, and average out in the sum
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * experts[0].size)


@pytest.mark.parametrize("form", ["sweeps over rows", "sweeps over columns", "complement", "whole"])
def test_every_form_gives_the_same(monkeypatch, form):
    plans = possible_gpu_plans((96, 97), 0.7, "min", "clean", 232_448)
    plan = next(plan for plan in plans if form in plan.describe() or form == plan.form)
    monkeypatch.setattr("freemerge.kernels.cuda.high_pass_magnitudes.plan_for", lambda *_: plan)
    experts = [random_array((96, 97), np.float32, seed=1)]
    expected = high_pass_magnitudes_reference(None, experts, 0.7, "min", "clean")
    np.testing.assert_allclose(magnitudes(None, experts), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(dtype):
    base, experts = random_array((31, 37), dtype, seed=0), [random_array((31, 37), dtype, seed=1)]
    expected = high_pass_magnitudes_reference(base, experts, 0.7, "min", "clean")
    np.testing.assert_allclose(magnitudes(base, experts), expected, rtol=1e-6)


def test_an_expert_does_not_depend_on_its_neighbours():
    base, *experts = (random_array((31, 37), np.float32, seed=t) for t in range(3))
    together = magnitudes(base, experts)
    np.testing.assert_array_equal(together, [magnitudes(base, [expert])[0] for expert in experts])


def test_an_expert_like_the_base_is_zero():
    base = random_array((31, 37), np.float32, seed=0)
    assert magnitudes(base, [base]) == [0]


def test_zero_size():
    np.testing.assert_array_equal(magnitudes(None, [np.zeros((0, 4), np.float32)]), [0])
