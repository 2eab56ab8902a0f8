"""Recipes of several documents: one result, equal to the documents merged one after the other."""

import json

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.documents import load_stages, stages_yaml
from freemerge.errors import CheckpointError, OutputError, PlanError, RecipeError
from freemerge.recipe import load_recipe


def documents(models):
    base, (math, code, chat) = models
    return f"""
merge_method: task_arithmetic
base_model: {base}
models: [{{model: stack}}, {{model: {chat}}}]
parameters: {{scaling: 0.5}}
---
name: stack
merge_method: passthrough
slices:
  - sources: [{{model: blend, layer_range: [0, 1]}}]
  - sources: [{{model: {code}, layer_range: [1, 2]}}]
---
name: blend
merge_method: linear
models: [{{model: {math}}}, {{model: {code}}}]
parameters: {{weight: 0.5}}
"""


def tensors_of(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name).copy() for name in checkpoint.tensors}


def test_stages_run_in_the_order_they_need_and_leave_one_result(models, tmp_path):
    text = documents(models)
    result = freemerge.merge(text, out=tmp_path / "out", fsync=False)
    assert not list(tmp_path.glob(".out*"))
    for name, model in (("blend", None), ("stack", "blend"), (None, "stack")):
        (stage,) = [stage for stage in load_stages(text) if stage.name == name]
        alone = stage.recipe.to_yaml()
        alone = alone.replace(f"model: {model}\n", f"model: {tmp_path / str(model)}\n") if model else alone
        freemerge.merge(alone, out=tmp_path / (name or "alone"), fsync=False)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "alone")
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)
    manifest = json.loads((tmp_path / "out/freemerge.json").read_text())
    assert [document.get("name") for document in manifest["recipe"]] == ["blend", "stack", None]
    assert sorted(item["name"] for item in manifest["inputs"]) == ["base", "chat", "code", "math"]
    assert result.bytes_in > result.bytes_out > 0


def test_all_stages_are_planned_before_one_runs(models, tmp_path):
    plans = freemerge.merge(documents(models), out=tmp_path / "out", dry_run=True)
    assert list(plans) == ["blend", "stack", None]
    assert [plan.summary()["merged"] for plan in plans.values()] == [21, 21, 21]
    whole = documents(models).replace("layer_range: [0, 1]", "layer_range: [0, 2]").replace("[1, 2]", "[0, 2]")
    single = "\n".join(line for line in whole.splitlines() if "/code, layer_range" not in line)
    assert freemerge.merge(single, dry_run=True)["stack"].summary()["tensors"] == 21
    beyond = documents(models).replace("[1, 2]", "[1, 3]")
    with pytest.raises(PlanError, match="it has 2 layers"):
        freemerge.merge(beyond, out=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_yaml_brings_the_stages_back(models):
    stages = load_stages(documents(models))
    assert load_stages(stages_yaml(stages)) == stages


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_resumes_with_the_stages_it_made(models, tmp_path, monkeypatch):
    text, out = documents(models), tmp_path / "out"
    freemerge.merge(text, out=tmp_path / "whole", fsync=False)
    with monkeypatch.context() as patch:
        run, ran = freemerge.api.run, []

        def stop_at_the_last(plan, place, **options):
            ran.append(place.name)
            run(plan, place, **options) if place != out else interrupted()

        patch.setattr("freemerge.api.run", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            freemerge.merge(text, out=out, fsync=False)
        with pytest.raises(OutputError, match="--resume continues it"):
            freemerge.merge(text, out=out, fsync=False)
        with pytest.raises(KeyboardInterrupt):
            freemerge.merge(text, out=out, fsync=False, resume=True)
    assert ran == ["blend", "stack", "out", "out"]
    assert not out.exists()
    freemerge.merge(text, out=out, fsync=False, resume=True)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".out*"))


def test_a_stage_that_fails_leaves_nothing(models, tmp_path):
    base, experts = models
    path = tmp_path / "chat/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # the last tensor ends in a bfloat16 NaN
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN or Inf in"):
        freemerge.merge(documents((base, experts)), out=tmp_path / "out", fsync=False)
    assert not list(tmp_path.glob("*out*"))


def test_an_existing_out_is_refused_before_any_stage(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        freemerge.merge(documents(models), out=tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
    freemerge.merge(documents(models), out=tmp_path / "out", overwrite=True, fsync=False)
    assert (tmp_path / "out/model.safetensors").exists()


LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: "
BAD = {
    "two results": (f"{LINEAR}[model: a]\n---\n{LINEAR}[model: b]\n", "more than one document has no name"),
    "name twice": (f"name: x\n{LINEAR}[model: a]\n---\nname: X\n{LINEAR}[model: x]\n", "'x': given to two documents"),
    "not a folder": (f"name: a/b\n{LINEAR}[model: a]\n---\n{LINEAR}[model: a/b]\n", "name 'a/b': it becomes a"),
    "unused": (f"name: x\n{LINEAR}[model: a]\n---\n{LINEAR}[model: b]\n", "x: no document has it among its models"),
    "cycle": (
        f"name: x\n{LINEAR}[model: y]\n---\nname: y\n{LINEAR}[model: x]\n---\n{LINEAR}[model: x]\n",
        "x: made from itself, by x <- y",
    ),
    "keys": (f"{LINEAR}[model: a]\n---\nname: x\ndtyp: f\n{LINEAR}[model: a]\n", "document 2: unknown key 'dtyp'"),
}


@pytest.mark.parametrize("case", BAD)
def test_documents_that_make_no_one_result_are_one_clear_error(case):
    text, expected = BAD[case]
    with pytest.raises(RecipeError) as caught:
        load_stages(text)
    assert expected in str(caught.value)
    assert "nothing was written" in str(caught.value)


def test_one_recipe_is_asked_for_and_several_come():
    with pytest.raises(RecipeError, match="holds 2 documents"):
        load_recipe(BAD["unused"][0])
