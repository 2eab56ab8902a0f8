"""free: which entries an expert keeps, its scale, and what it gives back when it is applied."""

import math

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import RecipeError
from freemerge.kernels.array import store
from freemerge.testing import random_array

SHAPES = {
    "layers.0.mlp.weight": (24, 40),
    "layers.0.mlp.bias": (40,),
    "embed.weight": (30, 8),
    "logit_scale": (),
    "empty": (0, 3),
}


def checkpoint(seed, dtype=np.float32, base=None, scale=1.0):
    tensors = {
        name: random_array(shape, dtype, seed * 100 + i, scale) for i, (name, shape) in enumerate(SHAPES.items())
    }
    if base is not None:
        for name, vector in tensors.items():
            store(base[name].astype(np.float32) + vector.astype(np.float32), vector)
    return tensors | {"steps": np.arange(3)}


@pytest.fixture
def models():
    base = checkpoint(0)
    return base, [checkpoint(t, base=base, scale=0.05) for t in (1, 2, 3)]


def dense(expert, name):
    return expert.tensors[name].to_dense() if name in expert.tensors else np.zeros(SHAPES[name], np.float32)


def largest(values, count):
    """The `count` largest magnitudes of a flat array, lower index first; the others zero."""
    kept = np.zeros_like(values)
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    kept[order] = values[order]
    return kept


def test_backbone_is_that_of_fr(models):
    base, experts = models
    ours = merge_state_dicts("free", base, experts, scaling=0.4)
    fr = merge_state_dicts("fr", base, experts, scaling=0.4)
    for name in base:
        np.testing.assert_array_equal(ours[name], fr[name])


@pytest.mark.parametrize("density", [0.0, 0.01, 0.07, 0.5])
def test_the_default_keeps_the_largest_of_each_tensor_relative_to_the_backbone(models, density):
    base, experts = models
    merged = merge_state_dicts("free", base, experts, density=density)
    for t, expert in enumerate(merged.experts):
        selected, whole = 0.0, 0.0
        for name in SHAPES:
            residual = experts[t][name] - merged[name]
            kept = largest(residual.ravel(), int(residual.size * density)).reshape(residual.shape)
            np.testing.assert_array_equal(dense(expert, name), kept)
            selected, whole = (
                selected + np.abs(kept, dtype=np.float64).sum(),
                whole + np.abs(residual, dtype=np.float64).sum(),
            )
        # both sums are in double; ours add float32 differences in another order
        expected = -math.log10(density) * (selected / density) / whole if density else 1.0
        assert expert.metadata["mu"] == pytest.approx(expected, rel=1e-12)
        applied = expert.apply(merged)
        for name in SHAPES:
            np.testing.assert_array_equal(
                applied[name], merged[name] + np.float32(expert.metadata["mu"]) * dense(expert, name)
            )


def test_density_1_with_a_number_gives_the_expert_back(models):
    base, experts = models
    merged = merge_state_dicts("free", base, experts, density=1.0, rescale=1.0)
    for expert, original in zip(merged.experts, experts, strict=True):
        for name, tensor in expert.apply(merged).items():
            # merged + (expert - merged) rounds twice
            np.testing.assert_allclose(tensor, original[name], rtol=0, atol=5e-7)


def test_row_selection_removes_and_keeps_per_row_and_passes_scalars_through(models):
    base, experts = models
    given = {"selection": "row", "relative_to": "base", "density": 0.2, "removal": 0.05, "rescale": 2.0}
    merged = merge_state_dicts("free", base, experts, **given)
    for t, expert in enumerate(merged.experts):
        for name, shape in SHAPES.items():
            if shape == ():
                assert dense(expert, name) == experts[t][name] - base[name]
                continue
            vector = (experts[t][name] - base[name]).reshape(-1, shape[-1])
            width = shape[-1]
            first, last = int(width * 0.05), int(width * 0.05) + int(width * 0.2)
            rows = [largest(row, last) - largest(row, first) for row in vector]
            np.testing.assert_array_equal(dense(expert, name), np.array(rows).reshape(shape))


@pytest.mark.parametrize("removal", [0.0, 0.03])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_model_selection_ranks_all_tensors_together(dtype, removal):
    base = checkpoint(0, dtype)
    experts = [checkpoint(t, dtype, base=base, scale=0.01) for t in (1, 2)]
    given = {"selection": "model", "relative_to": "base", "density": 0.05, "removal": removal, "exclude": ("embed",)}
    merged = merge_state_dicts("free", base, experts, **given)
    names = [name for name in sorted(SHAPES) if "embed" not in name]
    for t, expert in enumerate(merged.experts):
        flat = np.concatenate(
            [(experts[t][name].astype(np.float32) - base[name].astype(np.float32)).ravel() for name in names]
        )
        first = int(flat.size * removal)
        last = first + int(flat.size * 0.05)
        kept = np.concatenate([dense(expert, name).ravel() for name in names])
        np.testing.assert_array_equal(kept, largest(flat, last) - largest(flat, first))
        assert "embed.weight" not in expert.tensors
        assert sum(rows.count for rows in expert.tensors.values()) == last - first


def test_an_expert_that_crop_leaves_out_has_no_entries_of_that_tensor(models):
    base, experts = models
    rows, columns = SHAPES["layers.0.mlp.weight"]
    experts[1]["layers.0.mlp.weight"] = random_array((rows + 1, columns), np.float32, 7)
    merged = merge_state_dicts("free", base, experts, density=0.1, crop=True)
    without = merge_state_dicts("free", base, [experts[0], experts[2]], density=0.1)
    np.testing.assert_array_equal(merged["layers.0.mlp.weight"], without["layers.0.mlp.weight"])
    assert "layers.0.mlp.weight" not in merged.experts[1].tensors
    assert "layers.0.mlp.weight" in merged.experts[0].tensors
    assert np.isfinite(merged.experts[1].metadata["mu"])


def test_replace_puts_base_plus_entry_where_the_expert_has_one(models):
    base, experts = models
    given = {"combine": "replace", "relative_to": "base", "density": 0.1, "rescale": 3.0, "expert_scaling": 0.5}
    merged = merge_state_dicts("free", base, experts, **given)
    for expert in merged.experts:
        applied = expert.apply(merged)
        for name in SHAPES:
            entries = dense(expert, name)
            expected = np.where(entries != 0, base[name] + np.float32(1.5) * entries, merged[name])
            np.testing.assert_array_equal(applied[name], expected)


def test_an_expert_that_does_not_move_is_empty_of_effect(models):
    base, experts = models
    for rescale in ("official", "weighted"):
        merged = merge_state_dicts("free", base, [base, experts[0]], relative_to="base", rescale=rescale)
        assert merged.experts[0].metadata["mu"] == 1.0
        for name, tensor in merged.experts[0].apply(merged).items():
            np.testing.assert_array_equal(tensor, merged[name])


def test_official_mu_weighs_every_tensor_alike(models):
    base, experts = models
    given = {"variant": "vit8", "density": 0.1, "filter": (), "include": ()}
    merged = merge_state_dicts("free", base, experts, **given)
    for t, expert in enumerate(merged.experts):
        vectors = {name: experts[t][name] - base[name] for name in SHAPES}
        spread = np.mean([np.abs(vector).mean() if vector.size else 0.0 for vector in vectors.values()])
        kept = np.mean([np.abs(dense(expert, name)).mean() if SHAPES[name] != (0, 3) else 0.0 for name in SHAPES])
        # means of float32 values formed in different orders
        assert expert.metadata["mu"] == pytest.approx((kept / 0.1) / spread, rel=1e-5)


def test_densities_and_numbers_may_differ_between_tensors(models):
    base, experts = models
    given = {
        "density": [{"filter": "mlp.weight", "value": 0.25}, {"filter": "*", "value": 0.1}],
        "rescale": [{"filter": "embed", "value": 3.0}, {"filter": "*", "value": "weighted"}],
    }
    merged = merge_state_dicts("free", base, experts, **given)
    densities = {"layers.0.mlp.weight": 0.25, "layers.0.mlp.bias": 0.1, "logit_scale": 0.1}
    for t, expert in enumerate(merged.experts):
        vectors = {name: experts[t][name] - merged[name] for name in densities}
        kept = {name: largest(v.ravel(), int(v.size * densities[name])) for name, v in vectors.items()}
        density = sum(densities[name] * v.size for name, v in vectors.items()) / sum(v.size for v in vectors.values())
        selected, whole = (sum(np.abs(v, dtype=np.float64).sum() for v in d.values()) for d in (kept, vectors))
        # sums in double, in different orders
        assert expert.scale("layers.0.mlp.bias") == pytest.approx(
            -math.log10(density) * selected / density / whole, rel=1e-9
        )
        assert expert.scale("embed.weight") == 3.0


@pytest.mark.parametrize("relative_to", ["base", "merged"])
@pytest.mark.parametrize("given", [{"density": 0.0}, {"density": 0.1, "removal": 0.02}, {"density": 1.0}], ids=str)
def test_counts_of_model_selection_are_those_of_the_entries(given, relative_to):
    base, expert, merged = (checkpoint(seed, np.float16, scale=0.01) for seed in range(3))  # float16: many ties
    free = methods.get("free").module
    parameters = {p.name: p.default for p in methods.get("free").parameters.values()}
    parameters |= {"selection": "model", "relative_to": relative_to, **given}
    found = free.select_over_model(
        *([tensors[name] for name in SHAPES] for tensors in (base, merged, expert)), **parameters
    )
    for name, (selection, layout) in zip(SHAPES, found, strict=True):
        given = {"name": name, "within": [selection], **parameters}
        (rows,) = free.cut_experts(base[name], merged[name], [expert[name]], **given).parts
        assert (rows is None and expert[name].size == 0) or rows.layout == layout


@pytest.mark.parametrize("given", [{"density": 1.5}, {"density": -0.1}, {"removal": 2.0}], ids=str)
def test_shares_out_of_range_are_refused_by_the_plan(given):
    parameters = {p.name: p.default for p in methods.get("free").parameters.values()} | given
    with pytest.raises(RecipeError, match="from 0 to 1"):
        methods.get("free").module.plan_tensor("w", (3, 4), experts=2, **parameters)


def test_counts_are_known_from_shapes(models):
    base, experts = models
    for given in ({}, {"selection": "row", "density": 0.1}, {"density": 0.3, "removal": 0.9}, {"include": ("mlp",)}):
        parameters = {p.name: p.default for p in methods.get("free").parameters.values()} | given
        merged = merge_state_dicts("free", base, experts, **given)
        for expert in merged.experts:
            for name, shape in SHAPES.items():
                held = expert.tensors[name].layout if name in expert.tensors else None
                planned = methods.get("free").module.plan_expert(name, shape, np.dtype(np.float32), **parameters)
                assert held == planned, (given, name)
