"""mergekit's methods: edge cases and the law of the random ones; their arithmetic is in the goldens."""

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import InputError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, tiny_vit

TWO = {"nuslerp"}
ONE = {"slerp", "nearswap", "arcee_fusion", "passthrough"}
FAMILY = [
    *("ties", "breadcrumbs", "breadcrumbs_ties", "dare", "dare_linear", "dare_ties", "della", "della_linear", "sce"),
    *("model_stock", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "ram", "ramplus_tl", "arcee_fusion"),
    "passthrough",
]
GIVEN = {
    "ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.3},
    "breadcrumbs_ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "nearswap": {"t": 1e-3},
}


def models(make, method, dtype=np.float32):
    base = make(0, dtype=dtype)
    count = 1 if method in ONE else 2 if method in TWO else 3
    experts = [
        {
            name: np.asarray(array + np.asarray(random_array(array.shape, dtype, seed=t, scale=1e-3))).astype(dtype)
            for name, array in base.items()
        }
        for t in range(1, count + 1)
    ]
    return base if methods.get(method).uses_base else None, experts


@pytest.mark.parametrize("make", [tiny_llama, tiny_vit])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", FAMILY)
def test_merges_whole_models(method, dtype, make):
    base, experts = models(make, method, dtype)
    merged = merge_state_dicts(method, base, experts, **GIVEN.get(method, {}))
    for name, array in experts[0].items():
        assert merged[name].shape == array.shape
        change = np.abs(merged[name].astype(np.float32) - array.astype(np.float32)).max()
        assert change < 0.2  # near the models: they differ by 1e-3, and a sum of three rescaled ones by little more


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (5, 1), (2, 3, 4)], ids=str)
def test_odd_shapes(method, shape):
    base = {"w": np.asarray(random_array(shape, np.float32, seed=0))}
    count = 1 if method in ONE else 2 if method in TWO else 3
    experts = [{"w": np.asarray(random_array(shape, np.float32, seed=t))} for t in range(1, count + 1)]
    start = base if methods.get(method).uses_base else None
    merged = merge_state_dicts(method, start, experts, **GIVEN.get(method, {}))["w"]
    assert merged.shape == shape
    assert np.isfinite(merged).all()


@pytest.mark.parametrize("method", FAMILY)
def test_experts_equal_to_the_base_leave_it_as_it_is(method):
    base = {"w": random_array((20, 30), np.float32, seed=0)}
    count = 1 if method in ONE else 2 if method in TWO else 3
    start = base if methods.get(method).uses_base else None
    merged = merge_state_dicts(method, start, [base] * count, **GIVEN.get(method, {}))["w"]
    np.testing.assert_allclose(merged, base["w"], rtol=3e-7)  # angles: a mean of equal vectors, rounded


@pytest.mark.parametrize("method", ["dare", "dare_linear", "dare_ties", "della", "della_linear"])
def test_draws_depend_on_the_seed_and_nothing_else(method):
    base, experts = models(tiny_llama, method)
    merged = [
        merge_state_dicts(method, base, experts, density=0.5, seed=seed, threads=n) for seed, n in [(1, 1), (1, 2)]
    ]
    other = merge_state_dicts(method, base, experts, density=0.5, seed=2)
    reversed_names = dict(reversed(base.items()))
    merged.append(merge_state_dicts(method, reversed_names, experts, density=0.5, seed=1))
    assert all(np.array_equal(merged[0][name], same[name]) for same in merged[1:] for name in base)
    assert any(not np.array_equal(merged[0][name], other[name]) for name in base)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_the_sum_of_magnitudes_survives_the_drop(method):
    base, (expert, *_) = models(tiny_vit, method)
    zeros = {name: np.zeros_like(array) for name, array in base.items()}
    vectors = {name: expert[name] - array for name, array in base.items()}
    merged = merge_state_dicts(method, zeros, [vectors], density=0.4)
    for name, vector in vectors.items():
        kept = merged[name] != 0
        assert 0 < kept.mean() < 0.8
        factors = merged[name][kept] / vector[kept]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-5)  # of float32 entries
        np.testing.assert_allclose(np.abs(merged[name]).sum(), np.abs(vector).sum(), rtol=1e-5)


def test_dare_of_the_paper_divides_by_density():
    vectors = {"w": random_array((100, 100), np.float32, seed=0)}
    zeros = {"w": np.zeros((100, 100), np.float32)}
    merged = merge_state_dicts("dare", zeros, [vectors, vectors], density=0.25, then="average")["w"]
    ratios = np.unique(np.round(merged[merged != 0] / vectors["w"][merged != 0], 4))
    assert ratios.tolist() == [2, 4]  # kept of one expert, or of both, of two


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "della"])
def test_density_one_keeps_everything_and_zero_nothing(method):
    base, experts = models(tiny_llama, method)
    everything = merge_state_dicts(method, base, experts, density=1.0, normalize=False)
    elects = method != "breadcrumbs"
    for name, array in base.items():
        vectors = np.stack([expert[name] - array for expert in experts])
        if elects:
            vectors[np.sign(vectors) != np.where(vectors.sum(axis=0) >= 0, 1, -1)] = 0
        np.testing.assert_allclose(everything[name], array + vectors.sum(axis=0), rtol=0, atol=1e-6)  # float32
    nothing = merge_state_dicts(method, base, experts, density=0.0)
    if method != "ties":
        assert all(np.array_equal(nothing[name], array) for name, array in base.items())


def test_ties_keeps_one_entry_at_least():
    vectors = {"w": np.array([1, -5, 2], np.float32)}
    zeros = {"w": np.zeros(3, np.float32)}
    assert merge_state_dicts("ties", zeros, [vectors], density=0.01)["w"].tolist() == [0, -5, 0]
    assert merge_state_dicts("ties", zeros, [vectors], density=0.0)["w"].tolist() == [0, 0, 0]


def test_breadcrumbs_by_hand():
    vectors = {"w": np.array([1, -2, 3, -4, 5, -6, 7, -8, 9, -10], np.float32)}
    zeros = {"w": np.zeros(10, np.float32)}
    kept = merge_state_dicts("breadcrumbs", zeros, [vectors], density=0.3, gamma=0.2)["w"]
    assert kept.tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 0, 0]
    squeezed = merge_state_dicts("breadcrumbs", zeros, [vectors], density=0.9, gamma=0.2)["w"]
    assert squeezed.tolist() == [*vectors["w"][:9].tolist(), 0]  # there is room to leave out one


def test_slerp_goes_from_base_to_expert():
    base, (expert,) = models(tiny_llama, "slerp")
    for t, end in ((0.0, base), (1.0, expert)):
        merged = merge_state_dicts("slerp", base, [expert], t=t)
        assert all(np.array_equal(merged[name], end[name]) for name in base)
    right, up = {"w": np.array([1, 0], np.float32)}, {"w": np.array([0, 1], np.float32)}
    halfway = merge_state_dicts("slerp", right, [up], t=0.5)["w"]
    np.testing.assert_allclose(halfway, [np.sqrt(0.5)] * 2, rtol=1e-6)  # float32


@pytest.mark.parametrize("method", ["multislerp", "nuslerp", "karcher"])
def test_means_on_the_sphere_keep_the_length(method):
    right, up = {"w": np.array([2, 0], np.float32)}, {"w": np.array([0, 2], np.float32)}
    merged = merge_state_dicts(method, None, [right, up])["w"]
    np.testing.assert_allclose(merged, [np.sqrt(2)] * 2, rtol=1e-6)  # float32


def test_multislerp_refuses_directions_that_cancel():
    angles = np.arange(3) * 2 * np.pi / 3
    experts = [{"w": np.array([np.cos(a), np.sin(a), 0, 0])} for a in angles]
    with pytest.raises(InputError, match="cancel"):
        merge_state_dicts("multislerp", None, experts, eps=1e-6)


def test_passthrough_is_a_copy_times_scale():
    _, (model,) = models(tiny_vit, "passthrough", BFLOAT16)
    same, half = (merge_state_dicts("passthrough", None, [model], **given) for given in ({}, {"scale": [0.5]}))
    for name, array in model.items():
        assert same[name].tobytes() == array.tobytes()
        assert np.array_equal(half[name].astype(np.float32), array.astype(np.float32) / 2)


def test_ram_does_not_dilute():
    zeros = {"w": np.zeros(4, np.float32)}
    vectors = [{"w": np.array(row, np.float32)} for row in ([1, 2, 0, 0], [3, 0, 0, 1e-6])]
    assert merge_state_dicts("ram", zeros, vectors)["w"].tolist() == [2, 2, 0, 0]
    amplified = merge_state_dicts("ramplus_tl", zeros, vectors, r=0.5, alpha=2.0)["w"]
    np.testing.assert_allclose(amplified, [2, 2 * 1.5, 0, 0], rtol=1e-6)  # 1 shared to 1 unique: 1 + 0.5 * 1


@pytest.mark.parametrize(
    ("method", "count", "parameters", "problem"),
    [
        ("slerp", 2, {}, "slerp merges exactly 1 expert beside the base, not 2"),
        ("arcee_fusion", 2, {}, "exactly 1 expert"),
        ("passthrough", 2, {}, "exactly 1 expert"),
        ("nuslerp", 3, {}, "exactly 2 experts"),
        ("model_stock", 1, {}, "at least 2 experts"),
        ("nearswap", 1, {}, "nearswap has no default"),
        ("della", 2, {"density": 0.9}, "probabilities go from 0.75 to 1.05"),
        ("breadcrumbs", 2, {"gamma": 1.5}, "gamma: 1.5 is not a share"),
        ("sce", 2, {"select_topk": -1}, "select_topk: -1"),
        ("dare", 2, {"density": 2}, "density: 2.0 is not a share"),
    ],
)
def test_says_what_it_cannot_do(method, count, parameters, problem):
    model = {"w": np.ones((2, 2), np.float32)}
    base = model if methods.get(method).uses_base else None
    with pytest.raises(InputError, match=problem):
        merge_state_dicts(method, base, [model] * count, **parameters)
