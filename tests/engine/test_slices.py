"""Slices: layers stacked under new numbers, equal to the same layers taken and merged one by one in NumPy."""

import json

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import PlanError, RecipeError
from freemerge.recipe import load_recipe
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

LAYERS = 4
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Three models of four layers: name -> (folder, tensors)."""
    folder, made = tmp_path_factory.mktemp("zoo"), {}
    for seed, name in enumerate("abc"):
        tensors = tiny_llama(seed, num_hidden_layers=LAYERS)
        config = tiny_llama_config(num_hidden_layers=LAYERS, torch_dtype="float32", layer_types=list("wxyz"))
        made[name] = str(write_checkpoint(folder / name, tensors, config=config)), tensors
    return made


def source(zoo, name, first, stop, **parameters):
    entry = {"model": zoo[name][0], "layer_range": [first, stop]}
    return {**entry, "parameters": parameters} if parameters else entry


def merged(tmp_path, recipe):
    freemerge.merge(load_recipe(recipe).to_yaml(), out=tmp_path / "out", fsync=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.config


def layer(zoo, name, number):
    """The tensors of one layer by what follows the number."""
    head = f"model.layers.{number}."
    return {key.removeprefix(head): tensor for key, tensor in zoo[name][1].items() if key.startswith(head)}


def stacked(layers, outside):
    numbered = {f"model.layers.{i}.{key}": t for i, tensors in enumerate(layers) for key, t in tensors.items()}
    return numbered | outside


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1.2e-7, atol=1e-9, err_msg=name)  # one ulp of float32


def test_a_stack_of_two_models(zoo, tmp_path):
    sources = [source(zoo, "a", 0, 3), source(zoo, "b", 1, 4)]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [entry]} for entry in sources]}
    found, config = merged(tmp_path, recipe)
    layers = [layer(zoo, "a", i) for i in range(3)] + [layer(zoo, "b", i) for i in range(1, 4)]
    embedding, *rest = OUTSIDE
    outside = {embedding: zoo["a"][1][embedding]} | {name: zoo["b"][1][name] for name in rest}
    expected = stacked(layers, outside)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == list("wxyxyz")
    assert json.loads((tmp_path / "out/freemerge.json").read_text())["recipe"]["slices"][1]["sources"]


def test_parameters_of_source_slice_and_recipe_along_each_slice(zoo, tmp_path):
    filtered = [{"filter": "mlp", "value": [1, 0]}]
    recipe = {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": 0.5},
        "slices": [
            {"sources": [source(zoo, "a", 0, 3, weight=[0, 1]), source(zoo, "b", 1, 4, weight=filtered)]},
            {
                "sources": [source(zoo, "a", 3, 4, weight=[0.25, 0.75]), source(zoo, "c", 2, 3)],
                "parameters": {"weight": [{"filter": "layers.3.mlp", "value": 0.125}]},
            },
        ],
    }
    found, config = merged(tmp_path, recipe)
    layers = []
    for i, t in enumerate((0, 0.5, 1)):
        b = layer(zoo, "b", i + 1)
        of_b = {key: 1 - t if "mlp" in key else 0.5 for key in b}
        layers.append(
            {key: np.float32(t) * a + np.float32(of_b[key]) * b[key] for key, a in layer(zoo, "a", i).items()}
        )
    c = layer(zoo, "c", 2)
    last = layer(zoo, "a", 3).items()
    layers.append({key: np.float32(0.75) * a + np.float32(0.125 if "mlp" in key else 0.5) * c[key] for key, a in last})
    embedding, *rest = OUTSIDE
    a, b, c = (zoo[name][1] for name in "abc")
    outside = {embedding: np.float32(0.5) * b[embedding]}  # at the start of both gradients
    outside |= {name: np.float32(0.25) * a[name] + np.float32(0.5) * c[name] for name in rest}
    assert_equal(found, stacked(layers, outside))
    assert config["num_hidden_layers"] == LAYERS


def test_each_slice_may_have_a_base_of_its_own_or_be_the_base_alone(zoo, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": zoo["a"][0],
        "slices": [
            {"sources": [source(zoo, "c", 0, 1), source(zoo, "b", 2, 3)], "base_model": zoo["b"][0]},
            {"sources": [source(zoo, "a", 1, 3)]},
            {"sources": [source(zoo, "a", 3, 4), source(zoo, "b", 3, 4), source(zoo, "c", 3, 4)]},
        ],
        "parameters": {"scaling": 0.5},
    }
    found, _ = merged(tmp_path, recipe)

    def moved(base, *experts):
        return base + sum(np.float32(0.5) * (expert - base) for expert in experts)

    a, b, c = (zoo[name][1] for name in "abc")
    first = {key: moved(base, layer(zoo, "c", 0)[key]) for key, base in layer(zoo, "b", 2).items()}
    last = {
        key: moved(base, layer(zoo, "b", 3)[key], layer(zoo, "c", 3)[key]) for key, base in layer(zoo, "a", 3).items()
    }
    embedding, *rest = OUTSIDE
    outside = {embedding: moved(b[embedding], c[embedding])} | {n: moved(a[n], b[n], c[n]) for n in rest}
    expected = stacked([first, layer(zoo, "a", 1), layer(zoo, "a", 2), last], outside)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():  # two roundings of terms up to 0.1 in another order
        np.testing.assert_allclose(found[name], tensor, rtol=3e-7, atol=2e-8, err_msg=name)


def test_yaml_brings_slices_back_and_overriding_goes_before_all(zoo):
    pieces = [
        {
            "sources": [source(zoo, "b", 0, 2, weight=0.3), source(zoo, "a", 0, 2)],
            "parameters": {"weight": [0, 1]},
            "base_model": zoo["a"][0],
        }
    ]
    recipe = load_recipe({"merge_method": "task_arithmetic", "slices": pieces, "dtype": "float16"})
    assert load_recipe(recipe.to_yaml()) == recipe
    changed = recipe.overridden({"weight": 0.7})
    assert "0.3" not in changed.to_yaml()
    assert "[0, 1]" not in changed.to_yaml()
    assert changed.slices[0].recipe.parameters == {"weight": 0.7}
    with pytest.raises(RecipeError, match="one value for all experts"):
        recipe.overridden({"weight": {"b": 0.7}})


BAD = {
    "beyond": ("passthrough", [[("a", 3, 9)]], {}, "[3, 9] of {a}: it has 4 layers"),
    "uneven": ("linear", [[("a", 0, 3), ("b", 0, 2)]], {}, "slices[0]: its sources have 3, 2 layers"),
    "empty": ("passthrough", [[("a", 2, 2)]], {}, "slices[0].sources[0].layer_range: [2, 2]: [first layer"),
    "backwards": ("passthrough", [[("a", 2, 1)]], {}, "slices[0].sources[0].layer_range: [2, 1]"),
    "no sources": ("passthrough", [[]], {}, "slices[0].sources: at least one is expected"),
    "no base": ("task_arithmetic", [[("a", 0, 2)]], {}, "base_model: task_arithmetic merges differences"),
    "base elsewhere": ("task_arithmetic", [[("b", 0, 2)]], {"base_model": "a"}, "base_model a is not among its"),
    "two forms": ("linear", [[("a", 0, 2)]], {"models": [{"model": "a"}]}, "models and slices: both are given"),
    "parameter": ("linear", [[("a", 0, 2)]], {"parameters": {"wieght": 1}}, "did you mean weight?"),
    "experts": ("free", [[("a", 0, 2), ("b", 0, 2)]], {"base_model": "{a}"}, "free looks at whole models"),
    "key": ("linear", [[("a", 0, 2)]], {"slices": [{"sourcs": []}]}, "unknown key 'sourcs', did you mean sources?"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_clear_error(zoo, tmp_path, case):
    method, pieces, others, expected = BAD[case]
    slices = [{"sources": [source(zoo, *entry) for entry in entries]} for entries in pieces]
    folders = {name: folder for name, (folder, _) in zoo.items()}
    others = {key: value.format(**folders) if isinstance(value, str) else value for key, value in others.items()}
    with pytest.raises((RecipeError, PlanError)) as caught:
        merged(tmp_path, {"merge_method": method, "slices": slices, **others})
    assert expected.format(**folders) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_stack_are_refused_with_every_problem(zoo, tmp_path):
    wide = tiny_llama(3, num_hidden_layers=2, intermediate_size=96, vocab_size=176)
    config = tiny_llama_config(num_hidden_layers=2, intermediate_size=96, vocab_size=176)
    write_checkpoint(tmp_path / "wide", wide, config=config)
    other = {name.replace("model.layers", "model.h"): tensor for name, tensor in tiny_llama(4).items()}
    write_checkpoint(tmp_path / "other", other, config=tiny_llama_config())

    def problems(model):
        pieces = [[source(zoo, "a", 0, 2)], [{"model": str(tmp_path / model), "layer_range": [0, 2]}]]
        recipe = {"merge_method": "passthrough", "slices": [{"sources": piece} for piece in pieces]}
        with pytest.raises(PlanError) as caught:
            merged(tmp_path, recipe)
        return str(caught.value)

    assert "model.layers.2.mlp.up_proj.weight: [96, 48] from" in problems("wide")
    assert "lm_head.weight: [176, 48] from" in problems("wide")
    assert "the layers are called model.layers in" in problems("other")


def test_a_vision_tower_is_no_stack_to_slice(zoo, tmp_path):
    text = {f"language_model.{name}": tensor for name, tensor in zoo["a"][1].items()}
    tower = {f"vision.blocks.{i}.norm.weight": np.ones((3, 7), np.float32) for i in range(3)}
    tower |= {f"vision.blocks.{i}.{j}.weight": np.ones(3, np.float32) for i in range(3) for j in range(4)}
    config = {"text_config": {"num_hidden_layers": LAYERS}, "vision_config": {"depth": 3}}
    model = write_checkpoint(tmp_path / "model", text | tower, config=config)
    pieces = [{"sources": [{"model": str(model), "layer_range": layers}]} for layers in ([0, 3], [2, 4])]
    found, config = merged(tmp_path, {"merge_method": "passthrough", "slices": pieces})
    assert config["text_config"]["num_hidden_layers"] == 5
    assert len([name for name in found if name.startswith("vision.blocks")]) == len(tower)
    last = "language_model.model.layers.4.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[last], layer(zoo, "a", 3)["mlp.up_proj.weight"])
