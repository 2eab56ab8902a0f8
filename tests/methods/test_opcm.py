"""opcm: against the algorithm as published, step by step in float64; order, rescaling, what is simply added."""

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import CheckpointError
from freemerge.testing import random_array

SHAPES = {
    "a.weight": (12, 18),
    "b.weight": (18, 12),
    "c.bias": (18,),
    "embed.weight": (9, 12),
    "conv.weight": (3, 2, 2, 2),
}


def models(count, shapes=SHAPES, scale=0.1):
    base = {name: random_array(shape, np.float32, i) for i, (name, shape) in enumerate(shapes.items())}
    return base, [
        {
            name: np.asarray(array + random_array(array.shape, np.float32, 50 * t + i, scale))
            for i, (name, array) in enumerate(base.items(), 1)
        }
        for t in range(1, count + 1)
    ]


def norm(tensors):
    return np.sqrt(sum(np.sum(array**2) for array in tensors.values()))


def published(base, experts, alpha=0.5, rescaled=()):
    """The paper's loop: full decompositions, the running model rescaled after every expert."""
    start = {name: array.astype(np.float64) for name, array in base.items()}
    vectors = [{name: expert[name].astype(np.float64) - start[name] for name in start} for expert in experts]
    moved, coefficient, norms = vectors[0], 1.0, [norm(vectors[0])]
    for vector in vectors[1:]:
        added = {}
        for name, tau in vector.items():
            merged = moved[name]
            if name in rescaled:
                added[name] = merged
                continue
            if tau.ndim == 2 and "embed" not in name:
                u, s, vt = np.linalg.svd(merged)
                p = int(np.argmax(np.cumsum(s) > alpha * np.cumsum(s)[-1]))
                core = u.T @ tau @ vt.T
                np.fill_diagonal(core, 0)
                core[:p, :p] = 0
                tau = u @ core @ vt
            added[name] = coefficient * merged + tau
        norms.append(norm(vector))
        size, target = norm(added), np.mean(norms)
        coefficient = size / target
        moved = {name: array / coefficient for name, array in added.items()}
    return {name: start[name] + moved[name] for name in start}


def close(merged, expected):
    # float32 weights near 1, with updates near 0.1
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matches_the_published_loop(count, alpha):
    base, experts = models(count)
    close(merge_state_dicts("opcm", base, experts, alpha=alpha), published(base, experts, alpha))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1), (1, 5), (2, 2, 2)], ids=str)
def test_any_shape(shape):
    base, experts = models(3, {"a.weight": (6, 4), "odd.weight": shape})
    merged = merge_state_dicts("opcm", base, experts)
    assert merged["odd.weight"].shape == shape
    assert np.all(np.isfinite(merged["odd.weight"]))
    still = merge_state_dicts("opcm", base, [base, base])
    np.testing.assert_array_equal(still["odd.weight"], base["odd.weight"])


def test_rescaled_tensors_keep_the_first_expert():
    base, experts = models(3)
    given = {"rescaled": ["bias"]}
    close(merge_state_dicts("opcm", base, experts, **given), published(base, experts, rescaled=("c.bias",)))


def test_the_order_of_experts_matters():
    base, experts = models(3)
    forwards, backwards = (merge_state_dicts("opcm", base, order) for order in (experts, experts[::-1]))
    assert np.abs(forwards["a.weight"] - backwards["a.weight"]).max() > 1e-3
    close(backwards, published(base, experts[::-1]))


def test_the_merge_keeps_the_mean_norm():
    base, experts = models(4)
    merged = merge_state_dicts("opcm", base, experts)
    norms = [norm({name: expert[name] - base[name] for name in base}) for expert in experts]
    assert norm({name: merged[name] - base[name] for name in base}) == pytest.approx(np.mean(norms), rel=1e-5)


def test_experts_that_do_not_move():
    base, experts = models(2)
    close(merge_state_dicts("opcm", base, [base, base]), base)
    still_first = merge_state_dicts("opcm", base, [base, experts[0]])
    half = {name: base[name] + 0.5 * (experts[0][name] - base[name]) for name in base}
    close(still_first, half)  # of the mean of its norm and 0


def test_along_arbitrary_directions_nothing_is_taken_away():
    """Experts of rank 1: all directions but one are arbitrary."""
    base = {"w": np.zeros((8, 8), np.float32)}
    first, second = np.zeros((2, 8, 8), np.float32)
    first[0, 0], second[3, 4], second[5, 5], second[0, 0] = 2.0, 1.0, 1.0, 1.0
    merged = merge_state_dicts("opcm", base, [{"w": first}, {"w": second}])["w"]
    kept = first + second
    kept[0, 0] = 2.0
    norms = [np.linalg.norm(one) for one in (first, second)]
    np.testing.assert_allclose(merged, kept * np.mean(norms) / np.linalg.norm(kept), atol=1e-6)


def test_tied_tensors_count_once():
    base, experts = models(2)
    tied = [{**one, "z.weight": one["a.weight"]} for one in (base, *experts)]
    close(merge_state_dicts("opcm", tied[0], tied[1:]), merge_state_dicts("opcm", base, experts))


def test_a_nan_is_found_where_it_is():
    base, experts = models(2)
    experts[1]["c.bias"][3] = np.nan
    with pytest.raises(CheckpointError, match=r"c\.bias: NaN or Inf in expert1"):
        merge_state_dicts("opcm", base, experts)


def test_the_plan_says_what_is_done():
    opcm = methods.get("opcm")
    assert (opcm.scope, opcm.sweeps) == ("model", 1)
    given = {p.name: p.default for p in opcm.parameters.values()}
    assert "settled" not in given
    assert "orthogonal" in opcm.module.plan_tensor("a.weight", (4, 5), experts=3, **given).transform
    assert opcm.module.plan_tensor("embed.weight", (4, 5), experts=3, **given).transform == "sum"
    given["rescaled"] = ("a",)
    assert "rescaled" in opcm.module.plan_tensor("a.weight", (4, 5), experts=3, **given).transform
