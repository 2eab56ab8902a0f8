"""The recipe language: what is read, what is refused and how."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from freemerge import methods
from freemerge.errors import RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.recipe import Recipe, load_recipe
from freemerge.schema import parse_dtype
from freemerge.settings import check_recipe

MERGEKIT_TIES_STYLE = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: [0, 0.3, 0.7, 1]  # weight gradient
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: task_arithmetic
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def problems_of(recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return str(caught.value)


def test_reads_a_recipe_of_mergekits_documentation():
    recipe = load_recipe(MERGEKIT_TIES_STYLE)
    assert (recipe.method, recipe.base, recipe.dtype) == ("task_arithmetic", "TheBloke/Llama-2-13B-fp16", np.float16)
    assert [expert.name for expert in recipe.experts] == ["orca_mini_v3_13b", "Platypus2-13B"]
    assert recipe.experts[0].parameters == {"weight": [0, 0.3, 0.7, 1]}
    assert recipe.experts[1].parameters == {"weight": [{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0}]}
    assert recipe.tokenizer is None


def test_reads_a_file(tmp_path):
    (tmp_path / "merge.yml").write_text(MERGEKIT_TIES_STYLE)
    assert (
        load_recipe(tmp_path / "merge.yml")
        == load_recipe(str(tmp_path / "merge.yml"))
        == load_recipe(MERGEKIT_TIES_STYLE)
    )


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yml: cannot read this recipe: No such file" in problems_of(str(tmp_path / "nowhere.yml"))


def test_the_base_among_the_models_is_no_expert():
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "zoo/base",
        "models": [{"model": "zoo/base/"}, {"model": "math"}],
    }
    assert [expert.model for expert in load_recipe(content).experts] == ["math"]


def test_a_method_without_a_base_takes_it_as_a_model():
    content = {"merge_method": "linear", "base_model": "base", "models": [{"model": "base"}, {"model": "math"}]}
    assert [expert.model for expert in load_recipe(content).experts] == ["base", "math"]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/math", "other/math", "x/Math/"], ["math", "math-2", "Math-3"]),
        (["org/name@main", "a b/ü!"], ["name", "expert"]),
        (["runs/math/model.safetensors", "runs/code.safetensors", "model.safetensors"], ["math", "code", "model"]),
        (["..", ".hidden"], ["expert", "hidden"]),
    ],
)
def test_experts_are_named_after_their_folder(models, names):
    content = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    assert [expert.name for expert in load_recipe(content).experts] == names


def test_a_name_that_was_asked_for_goes_first():
    content = {"merge_method": "linear", "models": [{"model": "runs/math"}, {"model": "other", "name": "math"}]}
    assert [expert.name for expert in load_recipe(content).experts] == ["math-2", "math"]


def test_names_that_cannot_be_files_are_refused():
    content = {
        "merge_method": "linear",
        "models": [{"model": "a", "name": "../x"}, {"model": "b", "name": "A"}, {"model": "c", "name": "a"}],
    }
    text = problems_of(content)
    assert "2 problems" in text
    assert "name '../x': it becomes a file's name" in text
    assert "name 'a': given to two experts" in text


def test_all_problems_are_said_at_once():
    text = problems_of(
        {
            "merge_metod": "x",
            "merge_method": "tsak_arithmetic",
            "models": [{"model": "a", "paramters": {}}, 3, {"model": "base+adapter"}],
            "dtype": "bfloat17",
            "out_dtype": "int64",
            "slices": [{"sources": []}],
            "modules": {"a": 1},
            "parameters": {"weight": [[1]], "scaling": {"filtr": "a", "value": 1}, "normalize": None},
            "tokenizer": {"tokens": {"<s>": {}, "a": {"source": {"kind": "zeros"}}}, "pad_to_multiple_of": 0},
            "chat_template": "chatlm",
        }
    )
    for expected in [
        "unknown key 'merge_metod', did you mean merge_method?",
        "merge_method: unknown method 'tsak_arithmetic'; did you mean task_arithmetic?",
        "models[0]: unknown key 'paramters', did you mean parameters?",
        "models[1]: a mapping of names to values is expected, not 3",
        "dtype: bfloat17 is no dtype to write, did you mean bfloat16?",
        "out_dtype: int64 is no dtype to write",
        "slices[0].sources: at least one is expected",
        "modules.a: a mapping of names to values is expected, not 1",
        "parameters.weight: [1]: a number",
        "parameters.scaling: 'filtr' in a filtered list, did you mean filter?",
        "parameters.normalize: None: a number",
        "tokenizer.tokens.<s>: source is missing",
        "tokenizer.tokens.a.source: kind 'zeros', did you mean zero?",
        "tokenizer.pad_to_multiple_of: a whole number above 0 is expected, not 0",
        "chat_template: no template is called 'chatlm', did you mean chatml?; a template of your own is a Jinja text",
        "docs/recipe.md",
    ]:
        assert expected in text
    assert "15 problems, nothing was written" in text


def test_a_key_given_twice_is_refused():
    assert "'dtype' is given twice" in problems_of("merge_method: linear\ndtype: float16\ndtype: float32\n")


def test_a_second_document_is_refused():
    assert "holds 2 documents" in problems_of("merge_method: linear\n---\nmerge_method: linear\n")


@pytest.mark.parametrize(
    "text", ["models: [", "key: *nowhere", "? [a]\n: b\n", "a: !!python/object:os.system x", "a: \x01"]
)
def test_broken_yaml_is_one_clear_error(text):
    assert problems_of(text).startswith("recipe: ")


def test_an_empty_recipe_says_what_a_recipe_is():
    assert "a recipe is a mapping with merge_method" in problems_of("\n")


def test_scientific_numbers_are_numbers():
    recipe = load_recipe("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1e-3}")
    assert recipe.parameters == {"weight": 1e-3}


def test_a_model_may_be_a_mapping():
    content = {"merge_method": "linear", "models": [{"model": {"model": {"path": "org/a", "revision": "main"}}}]}
    assert load_recipe(content).experts[0].model == "org/a@main"
    content["models"][0]["model"]["lora"] = {"path": "b", "revision": "v1"}
    assert load_recipe(content).experts[0].model == "org/a@main+b@v1"
    content["models"][0]["model"]["override_architecture"] = "Llama"
    assert "override_architecture says nothing here" in problems_of(content)


def test_what_mergekit_makes_nothing_of_is_accepted():
    sources = [{"model": "b", "layer_range": [0, 1]}]
    content = {"merge_method": "linear", "models": None, "slices": [{"sources": sources, "residual_weight": 0.5}]}
    assert load_recipe(content) == load_recipe({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "slices": None, "modules": None}).experts
    models = [{"model": "a", "parameters": {"density": 0.3}}]
    shared = {"rescale": True, "int8_mask": True}
    content = {"merge_method": "task_arithmetic", "base_model": "b", "models": models, "parameters": shared}
    assert check_recipe(load_recipe(content), methods.get("task_arithmetic")) == []
    assert len(check_recipe(load_recipe({**content, "merge_method": "sce"}), methods.get("sce"))) == 2


def test_an_expert_with_an_adapter_is_named_after_that():
    models = [
        {"model": "org/llama@main+runs/math"},
        {"model": "llama+org/math@v1"},
        {"model": "a+b/adapter_model.safetensors"},
    ]
    recipe = load_recipe({"merge_method": "linear", "models": models})
    assert [expert.name for expert in recipe.experts] == ["math", "math-2", "b"]
    assert load_recipe(recipe.to_yaml()) == recipe


def test_the_tokenizer_is_that_of_all_of_the_base_of_a_model_or_of_a_folder(tmp_path):
    content = {"merge_method": "linear", "base_model": "base", "models": [{"model": "a"}]}

    def source(**given):
        recipe = load_recipe({**content, **given})
        assert load_recipe(recipe.to_yaml()) == recipe
        return recipe.tokenizer.source

    assert load_recipe(content).tokenizer is None
    assert source(tokenizer_source="base") == "base"
    assert source(tokenizer_source="base/") == "base"
    assert source(tokenizer_source="./a") == source(tokenizer={"source": "a"}) == "a"
    assert source(tokenizer_source="union") == source(tokenizer={}) == "union"
    assert source(tokenizer_source=str(tmp_path)) == str(tmp_path)
    assert "z is none of the models, and no folder; there is a, base, union" in problems_of(
        {**content, "tokenizer_source": "z"}
    )
    assert "both are given" in problems_of({**content, "tokenizer": {"source": "a"}, "tokenizer_source": "a"})


def test_a_merge_goes_on_with_the_tokens_it_began_with():
    content = {"merge_method": "opcm", "base_model": "base", "models": [{"model": "a"}], "continue_from": "before"}
    assert load_recipe({**content, "tokenizer_source": "base"}).tokenizer.source == "base"
    assert "continue_from: the earlier merge has the base's tokens" in problems_of({**content, "tokenizer": {}})


def test_rules_for_single_tokens():
    content = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    tokens = {
        "x": {"source": "./b", "force": True},
        "y": {"source": {"kind": "zero"}},
        "z": {"source": {"kind": "model_token", "model": "a", "token": "q"}},
        "0": {"source": {"kind": "model_token", "model": "a", "token_id": 0}},
    }
    recipe = load_recipe({**content, "tokenizer": {"tokens": tokens, "pad_to_multiple_of": 8}})
    assert [(rule.model, rule.token, rule.force) for rule in recipe.tokenizer.tokens.values()] == [
        ("b", None, True),
        (None, None, False),
        ("a", "q", False),
        ("a", 0, False),
    ]
    assert recipe.tokenizer.pad_to_multiple_of == 8
    assert load_recipe(recipe.to_yaml()) == recipe


def test_a_chat_template_is_a_name_or_a_jinja_text():
    content = {"merge_method": "linear", "models": [{"model": "a"}]}
    for said in ("{{ messages }}", "chatml", "auto", "{% generation %}{{ 1 }}{% endgeneration %}"):
        recipe = load_recipe({**content, "chat_template": said})
        assert recipe.chat_template == said
        assert load_recipe(recipe.to_yaml()) == recipe
    assert "chat_template: line 2 is no Jinja: " in problems_of({**content, "chat_template": "a\n{% for %}"})


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "bf16"])
def test_dtypes_by_any_of_their_names(name):
    assert parse_dtype(name) == BFLOAT16


class TestFromFlags:
    def test_experts_may_be_named(self):
        recipe = Recipe.from_flags(
            "task_arithmetic", "base", {"x": "runs/1", "y": "runs/2"}, {"scaling": 0.3}, dtype="bfloat16"
        )
        assert [(expert.name, expert.model) for expert in recipe.experts] == [("x", "runs/1"), ("y", "runs/2")]
        assert recipe.parameters == {"scaling": 0.3}
        assert recipe.dtype == BFLOAT16

    def test_one_number_for_each_expert(self):
        recipe = Recipe.from_flags("linear", None, ["a", "b"], {"weight": (0.25, 0.75)})
        assert [expert.parameters for expert in recipe.experts] == [{"weight": 0.25}, {"weight": 0.75}]

    def test_numbers_by_name(self):
        recipe = Recipe.from_flags("linear", None, ["runs/a", "runs/b"], {"weight": {"b": 2}})
        assert [expert.parameters for expert in recipe.experts] == [{}, {"weight": 2}]

    def test_filters_stay_what_they_are_in_a_recipe(self):
        filtered = [{"filter": "mlp", "value": [0, 1]}]
        assert Recipe.from_flags("linear", None, ["a"], {"weight": filtered}).parameters == {
            "weight": [{"filter": "mlp", "value": [0, 1]}]
        }

    def test_too_many_numbers_and_unknown_names_are_refused(self):
        with pytest.raises(RecipeError, match="weight: 3 numbers for 2 experts"):
            Recipe.from_flags("linear", None, ["a", "b"], {"weight": [1, 2, 3]})
        with pytest.raises(RecipeError, match=r"weight: no expert is called 'maths', did you mean math\?"):
            Recipe.from_flags("linear", None, ["runs/math", "b"], {"weight": {"maths": 1}})


words = st.text("abcdefg-_./", min_size=1, max_size=8).filter(lambda word: word.strip("./"))
numbers = st.floats(-2, 2, allow_subnormal=False) | st.integers(-3, 3)
scalars = numbers | st.booleans() | words
values = scalars | st.lists(numbers, min_size=1, max_size=4)
filtered = st.lists(st.fixed_dictionaries({"filter": words, "value": values}), min_size=1, max_size=3)
parameters = st.dictionaries(words, values | filtered, max_size=3)


@hypothesis_settings(deadline=None, derandomize=True, max_examples=100)
@given(
    base=st.none() | words,
    models=st.lists(st.fixed_dictionaries({"model": words, "parameters": parameters}), min_size=1, max_size=4),
    shared=parameters,
    dtype=st.sampled_from([None, "float16", "bfloat16", "float8_e4m3fn"]),
)
def test_yaml_brings_the_recipe_back(base, models, shared, dtype):
    content = {"merge_method": "linear", "models": models, "parameters": shared, "dtype": dtype}
    if base:
        content["base_model"] = base
    recipe = load_recipe(content)
    assert load_recipe(recipe.to_yaml()) == recipe
    assert load_recipe(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
