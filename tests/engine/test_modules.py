"""Modules: each part of a model merged its own way, equal to the same merges of whole models, part by part."""

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import PlanError, RecipeError
from freemerge.recipe import load_recipe
from freemerge.testing import random_array, tiny_llama, write_checkpoint

CONFIG = {
    "text_config": {"num_hidden_layers": 2, "vocab_size": 160},
    "vision_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]},
}
SHAPES = {f"vision_tower.blocks.{i}.{part}.weight": (6, 5) for i in range(2) for part in ("attn", "mlp", "norm")}
SHAPES |= {"vision_tower.patch_embed.weight": (6, 5), "multi_modal_projector.linear.weight": (48, 6)}


@pytest.fixture
def zoo(tmp_path):
    """Three models of a tower, a projector and a language model: name -> (folder, tensors)."""
    made = {}
    for seed, name in enumerate("abc"):
        tensors = {f"language_model.{key}": tensor for key, tensor in tiny_llama(seed).items()}
        for i, (key, shape) in enumerate(SHAPES.items()):
            tensors[key] = random_array(shape, np.float32, seed=100 * seed + i)
        made[name] = str(write_checkpoint(tmp_path / name, tensors, config=CONFIG)), tensors
    return made


def models(zoo, names, **parameters):
    return [{"model": zoo[name][0], **({"parameters": parameters} if parameters else {})} for name in names]


def merged(tmp_path, recipe):
    text = load_recipe(recipe).to_yaml()
    assert load_recipe(text) == load_recipe(recipe)
    freemerge.merge(text, out=tmp_path / "out", fsync=False, overwrite=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.config


def whole(tmp_path, recipe):
    return merged(tmp_path, recipe)[0]


def test_each_module_has_models_and_parameters_of_its_own(zoo, tmp_path):
    modules = {
        "vision_tower": {"models": models(zoo, "ab"), "parameters": {"weight": 0.25}},
        "text_decoder": {"models": models(zoo, "bc", weight=[0, 1])},
        "multi_modal_projector": {"models": models(zoo, "c")},
    }
    recipe = {"merge_method": "linear", "modules": modules, "parameters": {"weight": 0.5, "normalize": False}}
    found, config = merged(tmp_path, recipe)
    linear = {"merge_method": "linear", "parameters": {"weight": 0.5, "normalize": False}}
    text = whole(tmp_path, {**linear, "models": models(zoo, "bc", weight=[0, 1])})
    assert sorted(found) == sorted(zoo["a"][1])
    assert config == CONFIG
    for name, tensor in found.items():
        a, b, c = (zoo[model][1][name] for model in "abc")
        if name.startswith("vision"):
            np.testing.assert_array_equal(tensor, np.float32(0.25) * a + np.float32(0.25) * b)
        elif name.startswith("multi"):
            np.testing.assert_array_equal(tensor, np.float32(0.5) * c)
        else:
            np.testing.assert_array_equal(tensor, text[name])


def test_slices_of_one_module_change_its_configuration_alone(zoo, tmp_path):
    sources = [{"model": zoo["a"][0], "layer_range": [0, 2]}, {"model": zoo["b"][0], "layer_range": [1, 2]}]
    modules = {
        "vision_tower": {"slices": [{"sources": [source]} for source in sources]},
        "default": {"models": models(zoo, "a")},
    }
    found, config = merged(tmp_path, {"merge_method": "passthrough", "modules": modules})
    assert config["vision_config"] == {"num_hidden_layers": 3, "layer_types": ["x", "y", "y"]}
    assert config["text_config"] == CONFIG["text_config"]
    last = found["vision_tower.blocks.2.mlp.weight"]
    np.testing.assert_array_equal(last, zoo["b"][1]["vision_tower.blocks.1.mlp.weight"])
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name], zoo["a"][1][name])


def test_a_base_counts_in_every_module(zoo, tmp_path):
    modules = {"vision_tower": {"models": models(zoo, "b")}, "rest": {"models": models(zoo, "ac")}}
    recipe = {"merge_method": "task_arithmetic", "base_model": zoo["a"][0], "parameters": {"scaling": 0.5}}
    found, _ = merged(tmp_path, {**recipe, "modules": modules})
    for name, tensor in found.items():
        base, expert = zoo["a"][1][name], zoo["b" if name.startswith("vision") else "c"][1][name]
        np.testing.assert_allclose(tensor, base + np.float32(0.5) * (expert - base), rtol=1.2e-7, atol=1e-8)


def test_the_default_module_of_a_model_is_all_of_it(zoo, tmp_path):
    entry = {"models": models(zoo, "ab"), "parameters": {"weight": 0.25}}
    recipe = load_recipe({"merge_method": "linear", "modules": {"default": entry}})
    assert recipe == load_recipe({"merge_method": "linear", **entry})
    sources = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    recipe = load_recipe({"merge_method": "passthrough", "modules": {"default": {"slices": sources}}})
    assert recipe == load_recipe({"merge_method": "passthrough", "slices": sources})


def test_encoder_and_decoder_have_counts_of_their_own(tmp_path):
    tensors = {"shared.weight": random_array((9, 4), np.float32, seed=1)}
    for side, layers in (("encoder", 2), ("decoder", 2)):
        tensors |= {f"{side}.block.{i}.w": random_array((4, 4), np.float32, seed=i) for i in range(layers)}
    config = {"num_layers": 2, "num_decoder_layers": 2, "vocab_size": 9}
    folder = str(write_checkpoint(tmp_path / "t5", tensors, config=config))
    source = {"model": folder, "layer_range": [0, 2]}
    modules = {
        "decoder": {"slices": [{"sources": [source]}, {"sources": [source]}]},
        "encoder": {"slices": [{"sources": [source]}]},
        "shared": {"models": [{"model": folder}]},
    }
    found, config = merged(tmp_path, {"merge_method": "passthrough", "modules": modules})
    assert config == {"num_layers": 2, "num_decoder_layers": 4, "vocab_size": 9}
    np.testing.assert_array_equal(found["decoder.block.3.w"], tensors["decoder.block.1.w"])


def test_parameters_given_later_go_before_those_of_modules(zoo):
    entry = {"models": models(zoo, "ab", weight=0.3), "parameters": {"weight": 0.25}}
    slices = [{"sources": [{"model": zoo["a"][0], "layer_range": [0, 1], "parameters": {"weight": 0.35}}]}]
    modules = {"vision_tower": entry, "default": {"slices": slices}}
    recipe = load_recipe({"merge_method": "linear", "modules": modules})
    changed = recipe.overridden({"weight": 0.7}).to_yaml()
    assert not any(value in changed for value in ("0.3", "0.25", "0.35"))
    assert "weight: 0.7" in changed
    with pytest.raises(RecipeError, match="with modules a parameter has one value for all experts"):
        recipe.overridden({"weight": {"a": 0.7}})


ENTRY = {"models": [{"model": "{a}"}]}
BAD = {
    "two names": ({"vision": ENTRY, "text": ENTRY}, "no tensor's name begins with vision or text, and only one module"),
    "not all": ({"vision_tower": ENTRY, "language_model": ENTRY}, "none has multi_modal_projector.linear.weight; add"),
    "empty": (
        {key: ENTRY for key in ("vision_tower", "language_model", "multi_modal_projector", "x")},
        "modules.x: no tensor's name begins so; names begin with language_model, multi_modal_projector, vision_tower",
    ),
    "both": ({"default": {**ENTRY, "slices": []}, "b": {}}, "modules.b: models or slices, one of them is expected"),
    "parameter": (
        {"vision_tower": {**ENTRY, "parameters": {"wieght": 1}}, "r": ENTRY},
        "modules.vision_tower: parameters",
    ),
    "key": (
        {"default": {**ENTRY, "paramters": {}}},
        "modules.default: unknown key 'paramters', did you mean parameters?",
    ),
    "layers": (
        {"vision_tower": {"slices": [{"sources": [{"model": "{a}", "layer_range": [0, 3]}]}]}, "r": ENTRY},
        "layer_range [0, 3] of {a}: it has 2 layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_clear_error(zoo, tmp_path, case):
    modules, expected = BAD[case]

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value.format(a=zoo["a"][0]) if isinstance(value, str) else value

    with pytest.raises((RecipeError, PlanError)) as caught:
        merged(tmp_path, {"merge_method": "linear", "modules": filled(modules)})
    assert filled(expected) in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_methods_that_look_at_whole_models_take_no_modules(zoo):
    modules = {"vision_tower": {"models": models(zoo, "b")}, "rest": {"models": models(zoo, "b")}}
    recipe = {"merge_method": "free", "base_model": zoo["a"][0], "modules": modules}
    with pytest.raises(RecipeError, match="modules: free looks at whole models"):
        freemerge.merge(load_recipe(recipe).to_yaml(), dry_run=True)
