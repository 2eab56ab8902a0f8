"""Recipes that cannot be: each is one clear error that names key, value and remedy, before anything is written."""

import json

import pytest
import yaml

import freemerge
from freemerge.errors import InputError
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

KEYS = "docs/recipe.md describes every key."
PARAMETERS = "`freemerge methods task_arithmetic` explains its parameters."


def expert(name="math", **parameters):
    return {"model": f"{{{name}}}", "parameters": parameters}


def one_slice(*sources, **others):
    return {
        "models": None,
        "slices": [{"sources": [{"model": f"{{{n}}}", "layer_range": r} for n, r in sources], **others}],
    }


def tokens(**rules):
    return {"tokenizer": {"source": "base", "tokens": rules}}


# what is changed in a good recipe, what is said of it, and what is said to do; {base} and the like are models
BAD = {
    # keys
    "a key misspelt": ({"merge_metod": "ties"}, "unknown key 'merge_metod', did you mean merge_method?", KEYS),
    "a key of nothing": ({"zzz": 1}, "unknown key 'zzz'; there is base_model, chat_template", KEYS),
    "a key of a model misspelt": (
        {"models": [{"modle": "{math}"}]},
        "models[0]: unknown key 'modle', did you mean model?",
        KEYS,
    ),
    "no method": ({"merge_method": None}, "merge_method: a text is expected, not None", KEYS),
    "a method of another name": (
        {"merge_method": "task-arithmetics"},
        "unknown method 'task-arithmetics'; did you mean",
        KEYS,
    ),
    "a method that is a number": ({"merge_method": 3}, "merge_method: a text is expected, not 3", KEYS),
    "models that are one": ({"models": {"model": "{math}"}}, "models: a list is expected, not {{'model'", KEYS),
    "a model that is a word": (
        {"models": ["{math}"]},
        "models[0]: a mapping of names to values is expected, not '{math}'",
        KEYS,
    ),
    "a model without a model": ({"models": [{"parameters": {}}]}, "models[0]: model is missing", KEYS),
    "a model without a name": (
        {"models": [{"model": " "}]},
        "models[0].model: a folder, a file or a hub name is expected",
        KEYS,
    ),
    "an architecture": (
        {"models": [{"model": {"model": "{math}", "override_architecture": "Llama"}}]},
        "models[0].model: override_architecture says nothing here",
        "leave it out",
    ),
    "models and slices": (
        {"slices": [{"sources": [{"model": "{math}", "layer_range": [0, 1]}]}]},
        "models and slices: both are given",
        "keep one",
    ),
    "names that are the same": (
        {"models": [{**expert(), "name": "x"}, {**expert("code"), "name": "X"}]},
        "name 'X': given to two experts",
        KEYS,
    ),
    "a name that is no file's": (
        {"models": [{**expert(), "name": "a/b"}]},
        "name 'a/b': it becomes a file's name",
        "letters, digits, '_', '-'",
    ),
    # dtypes
    "a dtype of no kind": ({"dtype": "bfloat17"}, "dtype: bfloat17 is no dtype to write", "did you mean bfloat16?"),
    "a dtype of whole numbers": ({"out_dtype": "int8"}, "out_dtype: int8 is no dtype to write", KEYS),
    "a dtype that is a list": ({"dtype": ["float16"]}, "dtype: ['float16'] is no dtype to write", "float16"),
    # parameters
    "a parameter misspelt": (
        {"parameters": {"lamda": 1}},
        "parameters: task_arithmetic has no parameter 'lamda'",
        "did you mean lambda?",
    ),
    "a parameter of another method": (
        {"parameters": {"select_topk": 1}},
        "task_arithmetic has no parameter 'select_topk'; there is",
        PARAMETERS,
    ),
    "a parameter of all in a model": (
        {"models": [expert(scaling=1), expert("code")]},
        "models, math: scaling is one for all experts",
        "write it in the recipe's own parameters",
    ),
    "a parameter by two names": (
        {"parameters": {"lambda": 1, "scaling": 1}},
        "lambda and scaling are the same",
        "keep one",
    ),
    "a number that is a word": (
        {"parameters": {"lambda": "much"}},
        "lambda: 'much' is not a finite number",
        PARAMETERS,
    ),
    "a number without end": (
        {"parameters": {"lambda": float("inf")}},
        "lambda: inf is not a finite number",
        PARAMETERS,
    ),
    "a number that is none": (
        {"parameters": {"lambda": None}},
        "parameters.lambda: None: a number, true or false",
        KEYS,
    ),
    "a flag that is a word": (
        {"parameters": {"normalize": "maybe"}},
        "normalize: 'maybe' is not true or false",
        PARAMETERS,
    ),
    "a gradient without points": (
        {"parameters": {"lambda": []}},
        "lambda: an empty list is not a finite number",
        PARAMETERS,
    ),
    "a gradient with a word": ({"parameters": {"lambda": [0, "x"]}}, "lambda: 'x' is not a finite number", PARAMETERS),
    "a filter misspelt": (
        {"parameters": {"lambda": [{"filtr": "mlp", "value": 1}]}},
        "parameters.lambda: 'filtr' in a filtered list",
        "did you mean filter?",
    ),
    "a filter without a value": (
        {"parameters": {"lambda": [{"filter": "mlp"}]}},
        "each item of a filtered list is",
        KEYS,
    ),
    "a filter that is a number": (
        {"parameters": {"lambda": [{"filter": 3, "value": 1}]}},
        "parameters.lambda: filter 3: part of a tensor's name, or '*'",
        KEYS,
    ),
    "filters within filters": (
        {"parameters": {"lambda": [{"value": [{"value": 1}]}]}},
        "parameters.lambda: filters cannot be nested",
        KEYS,
    ),
    "parameters that are a list": (
        {"parameters": [1]},
        "parameters: a mapping of names to values is expected, not [1]",
        KEYS,
    ),
    "a weight for one expert only": (
        {"models": [expert(weight=1), expert("code")]},
        "weight: none for code, one for the other experts",
        "give all of them one",
    ),
    "a choice there is not": (
        {"merge_method": "fr", "parameters": {"variant": "vit80"}},
        "variant: 'vit80' is none of fr",
        "did you mean vit8?",
    ),
    # models
    "no base": (
        {"base_model": None},
        "base_model: task_arithmetic merges differences from a base",
        "say which model that is",
    ),
    "no expert": (
        {"models": [{"model": "{base}"}]},
        "models: there is no expert to merge",
        "base_model itself is not one",
    ),
    "too many for slerp": (
        {"merge_method": "slerp", "parameters": {"t": 0.5}},
        "slerp merges exactly 1 expert beside the base, not 2",
        "`freemerge methods slerp`",
    ),
    "a folder that is not there": (
        {"base_model": "/nowhere/at/all"},
        "/nowhere/at/all: no such file or directory",
        "Give a directory",
    ),
    "an adapter that is not there": (
        {"models": [{"model": "{math}+/nowhere"}]},
        "/nowhere: no such file or directory",
        "Give a directory",
    ),
    "a model of another width": (
        {"models": [{"model": "{wide}"}]},
        "model.layers.0.mlp.up_proj.weight: [80, 48] in {base}, [96, 48] in expert 0 ({wide})",
        "Merge models of one architecture",
    ),
    "a model of other tokens": (
        {"models": [{"model": "{tokens}"}]},
        "model.embed_tokens.weight: [160, 48] in {base}, [176, 48] in expert 0 ({tokens})",
        "write `tokenizer_source: base`, or `union`",
    ),
    "a model with a tied head": (
        {"models": [{"model": "{tied}"}]},
        "lm_head.weight: a weight of its own in {base}, tied in expert 0 ({tied})",
        "Merge models of one architecture",
    ),
    "a model with a prefix": (
        {"models": [{"model": "{prefix}"}]},
        "there it is called x.model.norm.weight",
        "save both models with the same prefix",
    ),
    "a model with other shapes": (
        {"models": [{"model": "{flat}"}]},
        "model.layers.1.self_attn.q_proj.weight: [48, 48] in {base}, [2304] in expert 0 ({flat})",
        "Merge models of one architecture",
    ),
    # slices
    "layers there are not": (
        {"merge_method": "passthrough", "base_model": None, **one_slice(("math", [1, 5]))},
        "slices[0]: layer_range [1, 5] of {math}: it has 2 layers",
        "`freemerge inspect` lists",
    ),
    "no layers": (
        one_slice(("base", [1, 1])),
        "slices[0].sources[0].layer_range: [1, 1]: [first layer,",
        "as in [0, 16]",
    ),
    "layers by words": (one_slice(("base", ["a", 2])), "slices[0].sources[0].layer_range: ['a', 2]", "as in [0, 16]"),
    "a slice of several lengths": (
        one_slice(("base", [0, 2]), ("math", [0, 1])),
        "slices[0]: its sources have 2, 1 layers",
        "give all as many",
    ),
    "a slice without its base": (
        one_slice(("math", [0, 1])),
        "slices[0]: base_model {base} is not among its sources",
        "add it",
    ),
    "a slice that is a list": (
        {"models": None, "slices": [[]]},
        "slices[0]: a mapping of names to values is expected",
        KEYS,
    ),
    "slices of a method of whole models": (
        {"merge_method": "free", **one_slice(("base", [0, 1]), ("math", [0, 1]))},
        "slices: free looks at whole models",
        "give them as models",
    ),
    # modules
    "a module without models": (
        {"models": None, "modules": {"x": {}}},
        "modules.x: models or slices, one of them",
        KEYS,
    ),
    "modules of no tensors": (
        {"models": None, "modules": {name: {"models": [{"model": "{math}"}]} for name in ("text", "vision")}},
        "modules: no tensor's name begins with text or vision",
        "names begin with lm_head, model",
    ),
    # tokenizers and templates
    "two tokenizers": (
        {"tokenizer": {}, "tokenizer_source": "base"},
        "tokenizer_source and tokenizer: both are given",
        "keep one",
    ),
    "a tokenizer of nobody": ({"tokenizer_source": "/nobody"}, "tokenizer: source /nobody is none of the models", KEYS),
    "a tokenizer that is not there": (
        {"tokenizer_source": "base"},
        "{base}: has no tokenizer.json",
        "docs/recipe.md, Tokenizers",
    ),
    "a token without a source": (tokens(x={}), "tokenizer.tokens.x: source is missing", KEYS),
    "a token from nobody": (
        tokens(x={"source": "zero"}),
        "tokenizer.tokens.x: source zero is none of the models",
        "{{kind: zero}}",
    ),
    "a token of no kind": (tokens(x={"source": {"kind": "zeros"}}), "kind 'zeros'", "did you mean zero?"),
    "a token by two names": (
        tokens(x={"source": {"kind": "model_token", "model": "{math}", "token": "a", "token_id": 1}}),
        "tokenizer.tokens.x.source: of a model_token either token, a text, or token_id, a row's number, is expected",
        KEYS,
    ),
    "a token by force of a word": (
        tokens(x={"source": "{math}", "force": "maybe"}),
        "tokenizer.tokens.x.force: true or false is expected, not 'maybe'",
        KEYS,
    ),
    "a padding of nothing": (
        {"tokenizer": {"pad_to_multiple_of": 0}},
        "tokenizer.pad_to_multiple_of: a whole number above 0 is expected, not 0",
        KEYS,
    ),
    "a template of no name": (
        {"chat_template": "chatlm"},
        "chat_template: no template is called 'chatlm'",
        "did you mean chatml?",
    ),
    "a template that is no Jinja": ({"chat_template": "{{% for %}}"}, "chat_template: line 1 is no Jinja", KEYS),
}

TEXTS = {
    "no YAML": ("models: [", "recipe: not YAML"),
    "a key twice": ("merge_method: linear\ndtype: float16\ndtype: float32\n", "'dtype' is given twice"),
    "a list": ("- a\n- b: c\n", "a recipe is a mapping with merge_method, base_model and models, not list"),
    "an object": ("a: !!python/object:os.system x\n", "could not determine a constructor for the tag"),
    "a file that is not there": ("nowhere.yml", "nowhere.yml: cannot read this recipe: No such file"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Names to folders: base, math and code fit together, the others each have something of their own."""
    folder = tmp_path_factory.mktemp("zoo")
    tensors = {name: tiny_llama(seed) for seed, name in enumerate(("base", "math", "code"))}
    tensors["wide"] = tiny_llama(3, intermediate_size=96)
    tensors["tokens"] = tiny_llama(4, vocab_size=176)
    tensors["tied"] = tiny_llama(5, tie_word_embeddings=True)
    tensors["prefix"] = {f"x.{name}": tensor for name, tensor in tiny_llama(6).items()}
    tensors["flat"] = tiny_llama(7)
    flat = "model.layers.1.self_attn.q_proj.weight"
    tensors["flat"][flat] = tensors["flat"][flat].reshape(-1)
    others = {"tied": {"tie_word_embeddings": True}, "wide": {"intermediate_size": 96}, "tokens": {"vocab_size": 176}}
    made = {}
    for name, weights in tensors.items():
        made[name] = str(write_checkpoint(folder / name, weights, config=tiny_llama_config(**others.get(name, {}))))
    return made


def filled(value, zoo):
    if isinstance(value, dict):
        return {key: filled(item, zoo) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, zoo) for item in value]
    return value.format(**zoo) if isinstance(value, str) else value


def good():
    return {"merge_method": "task_arithmetic", "base_model": "{base}", "models": [expert(), expert("code")]}


def test_the_recipe_that_is_changed_is_good(zoo, tmp_path):
    freemerge.merge(yaml.safe_dump(filled(good(), zoo)), out=tmp_path / "out", fsync=False)
    assert json.loads((tmp_path / "out/freemerge.json").read_text())["tensors"]


@pytest.mark.parametrize("case", BAD)
def test_each_is_one_clear_error(zoo, tmp_path, case):
    changes, said, remedy = BAD[case]
    with pytest.raises(InputError) as caught:
        freemerge.merge(yaml.safe_dump(filled(good() | changes, zoo)), out=tmp_path / "out", fsync=False)
    assert filled(said, zoo) in str(caught.value)
    assert filled(remedy, zoo) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", TEXTS)
def test_each_text_that_is_no_recipe_is_one_clear_error(tmp_path, case):
    text, said = TEXTS[case]
    with pytest.raises(InputError) as caught:
        freemerge.merge(text, out=tmp_path / "out", fsync=False)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())
