"""fr: what is filtered, summed, copied; align, elect and the shapes nobody thinks of."""

import numpy as np
import pytest

from freemerge import methods
from freemerge.kernels.high_pass import high_pass
from freemerge.testing import poisoned, random_array

MASK = {"cutoff": 0.7, "radius_from": "min", "inner_ring": "clean"}
WEIGHT, BIAS = "layers.0.mlp.up.weight", "layers.0.mlp.up.bias"


def defaults(method, **given):
    return {p.name: p.default for p in methods.get(method).parameters.values()} | given


def merged(name, base, experts, **given):
    out = poisoned(base.shape, np.float32)
    methods.get("fr").module.merge_tensor(base, experts, name=name, out=out, **given)
    return out


def filtered(vector, **mask):
    out = np.empty(vector.shape, np.float32)
    high_pass(np.zeros_like(vector), [vector], [1.0], **{**MASK, **mask}, out=out)
    return out


def close(a, b):
    # a float32 transform of numbers near 1: 2e-6 of the largest, as the goldens allow
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, float(np.max(np.abs(b), initial=0))))


@pytest.fixture
def matrices():
    return [random_array((20, 37), np.float32, seed) for seed in range(4)]


def test_matrices_are_filtered_and_the_rest_is_summed(matrices):
    base, *experts = matrices
    total = sum(expert - base for expert in experts)
    close(merged(WEIGHT, base, experts), base + 0.3 * filtered(total))
    close(merged("embed_tokens.weight", base, experts), base + 0.3 * total)
    close(merged("lm_head.weight", base, experts), base + 0.3 * total)
    close(merged(WEIGHT, base, experts, filter=()), base + 0.3 * total)
    close(merged(WEIGHT, base.ravel(), [expert.ravel() for expert in experts]), base.ravel() + 0.3 * total.ravel())


def test_names_that_look_like_heads_but_are_not_are_filtered():
    plan = methods.get("fr").module.plan_tensor
    for name in (
        "encoder.layer.0.output.dense.weight",
        "layers.0.multi_head_attention.weight",
        "h.0.attn.c_proj.weight",
    ):
        assert "unfiltered" not in plan(name, (8, 8), experts=2, **defaults("fr")).transform
    for name in ("output.weight", "head.weight", "classifier.dense.weight", "transformer.wte.weight", "shared.weight"):
        assert plan(name, (8, 8), experts=2, **defaults("fr")).transform == "sum, unfiltered"


def test_include_exclude_and_bias_rule(matrices):
    base, *experts = matrices
    total = sum(expert - base for expert in experts)
    for given in ({"exclude": ("mlp",)}, {"include": ("attn",)}):
        np.testing.assert_array_equal(merged(WEIGHT, base, experts, **given), base)
    np.testing.assert_array_equal(merged(BIAS, base, experts, bias_rule="base"), base)
    close(merged(BIAS, base, experts, bias_rule="first"), base + 0.3 * (experts[0] - base))
    close(merged(WEIGHT, base, experts, bias_rule="base"), base + 0.3 * filtered(total))


def test_weights_and_normalize(matrices):
    base, *experts = matrices
    weights = (0.5, 2.0, -0.3)
    total = sum(w * (expert - base) for w, expert in zip(weights, experts, strict=True))
    close(merged(WEIGHT, base, experts, weight=weights, scaling=1.0), base + filtered(total))
    close(merged(WEIGHT, base, experts, weight=weights, scaling=1.0, normalize=True), base + filtered(total) / 2.2)


@pytest.mark.parametrize("name", [WEIGHT, BIAS])
def test_align_scales_up_to_the_largest_mean_magnitude(matrices, name):
    base, first, second, _ = matrices
    experts = [first, base + 0.1 * (second - base), base.copy()]
    vectors = [expert - base for expert in experts]
    if name == WEIGHT:
        vectors = [filtered(vector) for vector in vectors]
    means = [np.abs(vector).mean() for vector in vectors]
    expected = base + 0.3 * (max(means) / means[0] * vectors[0] + max(means) / means[1] * vectors[1])
    close(merged(name, base, experts, align=True), expected)


def test_align_does_not_change_what_normalize_divides_by(matrices):
    base, *experts = matrices
    given = {"align": True, "weight": (0.5, 1.0, 0.5)}
    for elect in (False, True):
        alone = [base, base, experts[1]]  # experts that do not move neither vote nor have a ratio
        plain = merged(BIAS, base, alone, **given, elect=elect)
        close(plain, base + 0.3 * 0.5 * (experts[1] - base))
        normalized = merged(BIAS, base, alone, **given, elect=elect, normalize=True)
        close(normalized, base + 0.3 / (0.5 if elect else 2.0) * 0.5 * (experts[1] - base))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [WEIGHT, BIAS])
def test_elect_sums_what_agrees_with_the_sum(matrices, name, normalize):
    base, *experts = matrices
    weights = np.array([0.5, 1.0, 0.8], np.float32)
    vectors = [filtered(expert - base) if name == WEIGHT else expert - base for expert in experts]
    weighted = np.array([w * vector for w, vector in zip(weights, vectors, strict=True)])
    agrees = np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1)
    total = (weighted * agrees).sum(0)
    if normalize:
        total /= np.maximum((weights[:, None, None] * agrees).sum(0), 1e-9)
    decided = np.abs(weighted.sum(0)) > 1e-5  # rounding may decide the vote elsewhere
    result = merged(name, base, experts, elect=True, normalize=normalize, weight=tuple(map(float, weights)))
    close(result[decided], (base + 0.3 * total)[decided])


def test_elect_in_runs_equals_elect_at_once(monkeypatch, matrices):
    base, *experts = matrices
    whole = merged(BIAS, base, experts, elect=True)
    monkeypatch.setattr("freemerge.methods._backbone.ELECTED_RUN", 97)
    np.testing.assert_array_equal(merged(BIAS, base, experts, elect=True), whole)


@pytest.mark.parametrize("given", [{}, {"align": True}, {"elect": True}, {"bias_rule": "first"}], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (1, 1), (1, 9), (9, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_any_shape_and_number_of_experts(shape, given, count):
    base, *experts = (random_array(shape, np.float32, seed) for seed in range(count + 1))
    out = merged(WEIGHT, base, experts, **given)
    assert out.shape == shape
    assert np.all(np.isfinite(out))
    still = merged(WEIGHT, base, [base] * count, **given)
    # tau = 0: nothing moves, whatever the option
    np.testing.assert_array_equal(still, base)


def test_experts_left_out_by_crop(matrices):
    base, *experts = matrices
    close(
        merged(WEIGHT, base, [experts[0], None, experts[2]], weight=(1.0, 5.0, 0.5)),
        merged(WEIGHT, base, [experts[0], experts[2]], weight=(1.0, 0.5)),
    )
    np.testing.assert_array_equal(merged(WEIGHT, base, [None, None]), base)


def test_fit_expert_crops_the_vocabulary_and_skips_the_rest_only_on_request():
    fit = methods.get("fr").module.fit_expert
    assert fit("lm_head.weight", (10, 4), (12, 4), **defaults("fr")) is None
    given = defaults("fr", crop=True)
    assert fit("lm_head.weight", (10, 4), (12, 4), **given) == "crop"
    assert fit("model.embed_tokens.weight", (10, 4), (12, 6), **given) == "crop"
    assert fit("model.embed_tokens.weight", (10, 4), (8, 4), **given) == "skip"
    assert fit("mlp.weight", (10, 4), (12, 4), **given) == "skip"
    assert fit("lm_head.bias", (10,), (12,), **given) == "skip"


def test_the_plan_says_what_happens():
    plan = methods.get("fr").module.plan_tensor
    assert plan(WEIGHT, (64, 64), experts=3, **defaults("fr", exclude=("mlp",))).action == "copy"
    filtering = plan(WEIGHT, (64, 48), experts=3, **defaults("fr"))
    assert filtering.action == "merge"
    assert filtering.transform
    assert filtering.workspace >= 0
    electing = plan(WEIGHT, (64, 48), experts=3, **defaults("fr", elect=True))
    assert electing.workspace - filtering.workspace == 3 * 64 * 48 * 4
    assert plan(BIAS, (64,), experts=3, **defaults("fr", bias_rule="first")).transform == "first expert, unfiltered"
