"""Whole merges by the command line: by recipe and by flags, dry runs, verify, what bad input leaves behind."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from freemerge import cli
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Three tiny Llamas, base, math and code, in the working directory, and a recipe of them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "math", "code"]):
        write_checkpoint(name, tiny_llama(seed), config=tiny_llama_config())
    (tmp_path / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: math}, {model: code}]\n"
        "parameters:\n  scaling: [{filter: embed, value: 0}, {filter: layers, value: [0.2, 0.4]}, {value: 1}]\n"
    )
    return tmp_path


def test_a_recipe_is_merged_as_it_says(zoo):
    assert run("merge", "recipe.yml", "out").exit_code == 0
    merged = load_file("out/model.safetensors")
    base, math, code = (tiny_llama(seed) for seed in range(3))
    for name, scaling in {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.up_proj.weight": 0.2,
        "model.layers.1.mlp.up_proj.weight": 0.4,
        "model.norm.weight": 1.0,
    }.items():
        task_vectors = (math[name] - base[name]) + (code[name] - base[name])
        np.testing.assert_allclose(merged[name], base[name] + scaling * task_vectors, rtol=0, atol=1e-6, err_msg=name)


def test_flags_give_the_bytes_of_the_recipe(zoo):
    scaling = "scaling=[{filter: embed, value: 0}, {filter: layers, value: [0.2, 0.4]}, {value: 1}]"
    models = ["-m", "task_arithmetic", "-b", "base", "-e", "math", "-e", "code"]
    assert (
        run("merge", "recipe.yml", "one").exit_code == run("merge", *models, "-p", scaling, "-o", "two").exit_code == 0
    )
    assert (zoo / "one/model.safetensors").read_bytes() == (zoo / "two/model.safetensors").read_bytes()


def test_json_tells_what_was_written(zoo):
    told = json.loads(run("merge", "recipe.yml", "out", "--json", "--dtype", "bfloat16").stdout)
    assert told["out"] == "out"
    assert told["bytes_out"] == 2 * sum(tensor.size for tensor in tiny_llama(0).values())


def test_a_dry_run_writes_nothing(zoo):
    before = sorted(zoo.rglob("*"))
    plan = json.loads(run("merge", "recipe.yml", "out", "--dry-run", "--json").stdout)
    assert {row["tensor"] for row in plan["rows"]} == set(tiny_llama(0))
    assert sorted(zoo.rglob("*")) == before


def test_verify_finds_a_changed_byte(zoo):
    run("merge", "recipe.yml", "out")
    assert run("verify", "out").exit_code == 0
    shard = zoo / "out/model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    answer = run("verify", "out", "--json")
    assert answer.exit_code == 1
    assert len(json.loads(answer.stdout)["problems"]) == 1


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["-p", "scalling=1", "-p", "normalize=perhaps"],
            ["no parameter 'scalling', did you mean scaling?", "is not true or false"],
        ),
        (["--dtype", "float17"], ["float17 is no dtype to write, did you mean float16?"]),
        (["--device", "gpu"], ["there are auto, cpu, cuda"]),
        (["--max-gpu-memory", "much"], ["--max-gpu-memory much: not a size"]),
    ],
)
def test_bad_input_is_told_and_writes_nothing(zoo, arguments, messages):
    before = sorted(zoo.rglob("*"))
    answer = run("merge", "recipe.yml", "out", *arguments)
    assert answer.exit_code == 2
    assert all(message in answer.stderr for message in messages)
    assert sorted(zoo.rglob("*")) == before


def test_experts_are_listed_applied_and_extracted(zoo):
    flags = ["-m", "free", "-b", "base", "-e", "math", "-e", "code", "-p", "density=0.05"]
    assert run("merge", *flags, "-o", "out").exit_code == 0
    assert [expert["name"] for expert in json.loads(run("experts", "list", "out", "--json").stdout)] == ["code", "math"]
    assert run("experts", "apply", "out", "math", "plain").exit_code == 0
    merged, plain = load_file("out/model.safetensors"), load_file("plain/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.count_nonzero(merged[name] != plain[name]) == int(0.05 * merged[name].size)
    assert run("experts", "extract", "out", "math", "--name", "again", "-p", "density=0.05").exit_code == 0
    assert run("experts", "apply", "out", "again", "plain2").exit_code == 0
    assert (zoo / "plain/model.safetensors").read_bytes() == (zoo / "plain2/model.safetensors").read_bytes()
    assert run("verify", "out").exit_code == 0
    assert run("experts", "apply", "out", "math=0.75,again=0.25", "plain3").exit_code == 0  # the same expert twice
    both = load_file("plain3/model.safetensors")
    np.testing.assert_allclose(both[name], plain[name], rtol=0, atol=1e-6)
    for given, said in [("math=much", "NAME=WEIGHT"), ("math,math=2", "given twice"), ("math=1,law=2", "there are: ")]:
        answer = run("experts", "apply", "out", given, "plain4")
        assert answer.exit_code != 0
        assert said in answer.stderr


def test_an_expert_that_is_not_there_is_told_with_those_that_are(zoo):
    run("merge", "-m", "free", "-b", "base", "-e", "math", "-e", "code", "-o", "out")
    answer = run("experts", "apply", "out", "maths", "plain")
    assert (answer.exit_code, (zoo / "plain").exists()) == (2, False)
    assert "code, math" in answer.stderr
