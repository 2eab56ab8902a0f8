"""Parameters of a tensor: gradients, filters and precedence against values worked out by hand, and what is refused."""

import types

import pytest

from freemerge.errors import RecipeError
from freemerge.methods import Parameter
from freemerge.recipe import load_recipe
from freemerge.settings import check_recipe, layer_positions, settings


def parameter(name, default, kind="number", per_expert=False, choices=()):
    return Parameter(name, default, kind, per_expert, choices, "")


PARAMETERS = [
    parameter("weight", None, per_expert=True),
    parameter("density", 1.0, per_expert=True),
    parameter("scaling", 0.3),
    parameter("steps", 10, "integer"),
    parameter("normalize", False, "flag"),
    parameter("radius_from", "min", "choice", choices=("min", "max")),
    parameter("filtered", ("weight",), "patterns"),
    parameter("rescale", "weighted", "number-or-choice", choices=("official", "weighted")),
]
METHOD = types.SimpleNamespace(
    name="toy",
    uses_base=True,
    base_optional=False,
    merges_adapters=False,
    keeps_state=False,
    variants={"vit8": {"scaling": 0.7, "density": 0.01, "radius_from": "max"}, "llm": {"scaling": 1.1}},
    aliases={"lambda": "scaling"},
    parameters={p.name: p for p in PARAMETERS},
)


def recipe_of(shared=None, *experts):
    models = [{"model": f"e{i}", "parameters": values} for i, values in enumerate(experts or [{}])]
    return load_recipe(
        {"merge_method": "task_arithmetic", "base_model": "b", "models": models, "parameters": shared or {}}
    )


def resolved(shared=None, *experts, name="model.layers.0.mlp.weight", position=None):
    recipe = recipe_of(shared, *experts)
    assert check_recipe(recipe, METHOD) == []
    return settings(recipe, METHOD, name, position)


def test_nothing_given_is_the_default():
    assert resolved() == {
        "weight": None,
        "density": (1.0,),
        "scaling": 0.3,
        "steps": 10,
        "normalize": False,
        "radius_from": "min",
        "filtered": ("weight",),
        "rescale": "weighted",
    }


def test_an_experts_own_value_goes_before_the_shared_one():
    assert resolved({"density": 0.5}, {"density": 0.1}, {}, {"density": 0.3})["density"] == (0.1, 0.5, 0.3)


def test_a_variant_presets_and_everything_given_overrides_it():
    values = resolved({"variant": "vit8", "scaling": 2}, {}, {"density": 0.5})
    assert (values["scaling"], values["density"], values["radius_from"]) == (2.0, (0.01, 0.5), "max")
    assert "variant" not in values


# t * (points - 1), then linear between its neighbours: 0.25 * 3 = 0.75 -> 0 + 0.75 * 0.3
@pytest.mark.parametrize(
    ("position", "value"), [(0, 0), (0.25, 0.225), (1 / 3, 0.3), (0.5, 0.5), (0.9, 0.91), (1, 1), (None, 1)]
)
def test_a_gradient_is_linear_between_its_points(position, value):
    assert resolved({"scaling": [0, 0.3, 0.7, 1]}, position=position)["scaling"] == pytest.approx(value, abs=1e-15)


def test_a_gradient_of_one_point_is_that_point():
    assert resolved({"scaling": [0.4]}, position=0.7)["scaling"] == 0.4


def test_gradients_of_other_kinds():
    assert resolved({"steps": [0, 10]}, position=0.26)["steps"] == 3
    words = {"radius_from": ["min", "max", "min"]}  # as in mergekit: the word before the position, not interpolated
    assert [resolved(words, position=t)["radius_from"] for t in (0, 0.49, 0.5, 0.99, 1)] == [
        "min",
        "min",
        "max",
        "max",
        "min",
    ]


def test_the_first_filter_that_matches_counts():
    weight = {"weight": [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.2}, {"value": 0.5}]}
    at = {
        name: resolved({}, weight, name=f"model.layers.1.{name}", position=0.75)["weight"]
        for name in ("self_attn.q", "mlp.up", "norm")
    }
    assert at == {"self_attn.q": (0.75,), "mlp.up": (0.2,), "norm": (0.5,)}


def test_no_filter_that_matches_asks_the_next_in_line():
    only_mlp = {
        "scaling": [{"filter": "mlp", "value": 0.2}],
        "density": [{"filter": "mlp", "value": 0.5}],
        "variant": "vit8",
    }
    experts = {"density": [{"filter": "up", "value": 0.4}]}, {}
    assert resolved(only_mlp, *experts, name="mlp.up")["density"] == (0.4, 0.5)
    assert resolved(only_mlp, *experts, name="mlp.down")["density"] == (0.5, 0.5)
    assert resolved(only_mlp, *experts, name="norm")["density"] == (0.01, 0.01)
    assert resolved(only_mlp, *experts, name="norm")["scaling"] == 0.7


def test_a_single_filter_needs_no_list():
    assert resolved({"scaling": {"filter": "mlp", "value": 0.2}}, name="norm")["scaling"] == 0.3


def test_values_become_what_the_method_takes():
    values = resolved({"scaling": "1e-2", "normalize": 1.0, "steps": 3.0, "filtered": "attn", "rescale": 7})
    assert (values["scaling"], values["normalize"], values["steps"]) == (0.01, True, 3)
    assert (values["filtered"], values["rescale"]) == (("attn",), 7.0)
    assert resolved({"filtered": []})["filtered"] == ()
    assert resolved({"filtered": ["attn", "mlp"], "rescale": "official"})["filtered"] == ("attn", "mlp")


def test_mergekits_names_are_understood():
    assert resolved({"lambda": 1.1, "int8_mask": True})["scaling"] == 1.1


def test_every_problem_with_the_method_is_said():
    recipe = load_recipe(
        {
            "merge_method": "task_arithmetic",
            "models": [
                {"model": "x/math", "parameters": {"wieght": 1, "scaling": 1, "density": "all", "variant": "vit8"}}
            ],
            "parameters": {
                "radius_from": "mean",
                "normalize": "perhaps",
                "scaling": [0.1, float("inf")],
                "steps": 1.5,
                "density": [],
                "filtered": "(",
                "rescale": True,
                "lambda": 1,
                "variant": "vit80",
                "zzz": 1,
            },
        }
    )
    assert check_recipe(recipe, METHOD) == [
        "base_model: toy merges differences from a base; say which model that is",
        "parameters: radius_from: 'mean' is not one of min, max",
        "parameters: normalize: 'perhaps' is not true or false",
        "parameters: scaling: inf is not a finite number",
        "parameters: steps: 1.5 is not a whole number",
        "parameters: density: an empty list is not a finite number",
        "parameters: filtered: '(' is not a regular expression or a list of them",
        "parameters: rescale: True is not a finite number or one of official, weighted",
        "parameters: variant: 'vit80' is none of toy, did you mean vit8?",
        "parameters: toy has no parameter 'zzz'; there is density, filtered, lambda, normalize, radius_from, rescale, "
        "scaling, steps, variant, weight",
        "parameters: lambda and scaling are the same parameter; keep one",
        "models, math: toy has no parameter 'wieght', did you mean weight?",
        "models, math: scaling is one for all experts; write it in the recipe's own parameters",
        "models, math: density: 'all' is not a finite number",
        "models, math: variant is one for all experts; write it in the recipe's own parameters",
    ]


def test_no_expert_is_a_problem():
    recipe = load_recipe({"merge_method": "task_arithmetic", "base_model": "b", "models": [{"model": "b"}]})
    assert check_recipe(recipe, METHOD) == ["models: there is no expert to merge (base_model itself is not one)"]


def test_a_weight_for_some_experts_only():
    message = "weight: none for e1, one for the other experts; give all of them one"
    assert check_recipe(recipe_of({}, {"weight": 1}, {}), METHOD) == [message]
    by_filter = recipe_of({}, {"weight": 1}, {"weight": [{"filter": "mlp", "value": 1}]})
    assert settings(by_filter, METHOD, "mlp")["weight"] == (1.0, 1.0)
    with pytest.raises(RecipeError, match=f"^norm: {message}"):
        settings(by_filter, METHOD, "norm")


class TestLayerPositions:
    def test_a_decoder(self):
        names = [
            "model.embed_tokens.weight",
            *(f"model.layers.{i}.mlp.experts.{j}.w" for i in range(5) for j in range(2)),
            "lm_head.weight",
        ]
        positions = layer_positions(names)
        assert positions["model.embed_tokens.weight"] == 0
        assert [positions[f"model.layers.{i}.mlp.experts.1.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        assert positions["lm_head.weight"] == 0

    def test_each_stack_has_its_own_length(self):
        names = [f"encoder.layer.{i}.w" for i in range(3)] + [f"decoder.block.{i}.w" for i in range(2)]
        assert list(layer_positions(names).values()) == [0, 0.5, 1, 0, 1]

    def test_gpt2_and_bare_names(self):
        assert layer_positions(["wte.weight", "h.0.w", "h.1.w", "ln_f.w"]) == {
            "wte.weight": 0,
            "h.0.w": 0,
            "h.1.w": 1,
            "ln_f.w": 0,
        }
        assert layer_positions(["0.w", "1.w", "2.w"]) == {"0.w": 0, "1.w": 0.5, "2.w": 1}

    def test_a_classifier_with_gaps_or_beside_a_large_stack_is_no_stack(self):
        assert layer_positions(["classifier.0.w", "classifier.2.w"]) == {"classifier.0.w": 0, "classifier.2.w": 0}
        blocks = [f"layers.{i}.{part}" for i in range(12) for part in "qkvo"]
        assert layer_positions([*blocks, "head.0.w", "head.1.w"])["head.0.w"] == 0

    def test_one_layer_stands_last_as_in_mergekit(self):
        assert layer_positions(["layers.0.w"]) == {"layers.0.w": 1}

    def test_no_names(self):
        assert layer_positions([]) == {}
