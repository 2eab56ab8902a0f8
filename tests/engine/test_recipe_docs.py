"""The recipes and the call in docs/recipe.md are read as they stand there."""

import ast
import re
from pathlib import Path

import pytest

from freemerge import methods
from freemerge.documents import load_stages
from freemerge.recipe import Recipe
from freemerge.schema import Document
from freemerge.settings import check_recipe

TEXT = (Path(__file__).parents[2] / "docs/recipe.md").read_text("utf-8")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_yaml_examples(example):
    *_, last = stages = load_stages(example)
    assert len(last.recipe.experts) == 2
    for stage in stages:
        assert check_recipe(stage.recipe, methods.get(stage.recipe.method)) == []


def test_python_example():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    call = ast.parse(example, mode="eval").body
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg != "out"}
    base, experts, dtype = (given.pop(key) for key in ("base", "experts", "dtype"))
    recipe = Recipe.from_flags(ast.literal_eval(call.args[0]), base, experts, given, dtype=dtype)
    assert check_recipe(recipe, methods.get(recipe.method)) == []
    assert recipe.experts[1].parameters == {"weight": 0.4}


@pytest.mark.parametrize("key", Document.model_fields)
def test_every_key_is_described(key):
    assert f"`{key}`" in TEXT or f"`{key}:" in TEXT
