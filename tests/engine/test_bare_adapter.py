"""LoRA adapters merged into an adapter: what PEFT loads; factors are never taken for weights."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.cli import app
from freemerge.errors import CheckpointError, PlanError, RecipeError
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint, write_safetensors

Q = "base_model.model.model.layers.{}.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "llama",
}


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "llama", tiny_llama(0), config=tiny_llama_config())


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter directory."""

    def write(name, seed=0, renamed=str, **config):
        folder = tmp_path / name
        folder.mkdir()
        content = CONFIG | {"base_model_name_or_path": str(tmp_path / "llama")} | config
        (folder / "adapter_config.json").write_text(json.dumps(content))
        rank = content["r"]
        shapes = {f"{Q}.lora_A.weight": (rank, 48), f"{Q}.lora_B.weight": (48, rank)}
        tensors = {
            renamed(key.format(i)): random_array(shape, np.float32, seed + 10 * i + k, 0.1)
            for i in range(2)
            for k, (key, shape) in enumerate(shapes.items())
        }
        write_safetensors(folder / "adapter_model.safetensors", tensors)
        return folder

    return write


def tensors_in(path):
    with open_checkpoint(path) as opened:
        return {name: np.array(opened.read(name)) for name in opened.tensors}


def weights(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {
        name: np.frombuffer(content, "<f4", int(np.prod(info["shape"])), 8 + length + info["data_offsets"][0]).reshape(
            info["shape"]
        )
        for name, info in header.items()
        if name != "__metadata__"
    }


def test_the_result_is_an_adapter(tmp_path, adapter):
    folders = [adapter(name, 100 * t) for t, name in enumerate(("a", "b", "c"))]
    (folders[0] / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    result = freemerge.merge("copa", experts=folders, out=out)
    assert result.tensors == 4
    written = {path.name for path in out.iterdir()}
    assert written == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "freemerge.json",
        "tokenizer.json",
    }
    assert (out / "adapter_config.json").read_bytes() == (folders[0] / "adapter_config.json").read_bytes()
    assert "library_name: peft" in (out / "README.md").read_text()
    assert verify(out).ok
    expected = freemerge.merge_state_dicts("copa", None, [weights(folder) for folder in folders])
    found = weights(out)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_names_are_those_peft_saves(tmp_path, adapter):
    plain, named = adapter("a", 1), adapter("b", 1, renamed=lambda key: key.replace(".weight", ".task.weight"))
    freemerge.merge("copa", experts=[named, plain], out=tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(plain).keys()


def test_the_result_applied_is_base_plus_scaled_product(tmp_path, base, adapter):
    folders = [adapter("a", 1), adapter("b", 2)]
    freemerge.merge("copa", experts=folders, out=tmp_path / "merged")
    freemerge.merge("passthrough", experts=[f"{base}+{tmp_path / 'merged'}"], out=tmp_path / "full")
    start, found, factors = tensors_in(base), tensors_in(tmp_path / "full"), weights(tmp_path / "merged")
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        a, b = (factors[f"{Q.format(i)}.lora_{part}.weight"].astype(float) for part in "AB")
        start[name] = start[name] + 8 / 4 * b @ a
    for name, array in start.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6, err_msg=name)


def test_command_and_plan(tmp_path, adapter):
    folders = [str(adapter("a", 1)), str(adapter("b", 2))]
    words = ["merge", "--method", "copa", "-e", folders[0], "-e", folders[1], "-p", "fuse_weight=1"]
    planned = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert json.loads(planned.output)["shards"] == ["adapter_model.safetensors"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0, done.output
    expected = freemerge.merge_state_dicts("copa", None, [weights(tmp_path / name) for name in "ab"], fuse_weight=1)
    for name, array in weights(tmp_path / "out").items():
        np.testing.assert_array_equal(expected[name], array)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_peft_loads_it_and_gives_the_same_logits(tmp_path, base, adapter):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    freemerge.merge("copa", experts=[adapter("a", 1), adapter("b", 2)], out=tmp_path / "merged")
    freemerge.merge("passthrough", experts=[f"{base}+{tmp_path / 'merged'}"], out=tmp_path / "full")
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        start = plain(tokens).logits
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "merged")(tokens).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(tokens).logits
    # float32 products in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (theirs - start).abs().max() > 1e-3


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(kind, tmp_path, method, experts, **options):
    with pytest.raises(kind) as caught:
        freemerge.merge(method, experts=experts, out=tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_configurations_that_disagree_are_said_at_once(tmp_path, adapter):
    other = {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    other |= {"base_model_name_or_path": "org/other"}
    said = refused(PlanError, tmp_path, "copa", [adapter("a"), adapter("b", **other)])
    for text in ("5 problems", "r: 4 in ", "lora_alpha: 8 in", "use_rslora: False in", "target_modules: ['q_proj'] in"):
        assert text in said
    assert "base_model_name_or_path: llama in" in said


def test_configurations_that_mean_the_same(tmp_path, adapter):
    first = adapter("a", target_modules=["q_proj", "v_proj"], alpha_pattern={})
    same = {"target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "elsewhere/llama", "use_rslora": None}
    freemerge.merge("copa", experts=[first, adapter("b", 5, **same)], out=tmp_path / "out")


def test_factors_are_not_merged_as_weights(tmp_path, base, adapter):
    folders = [adapter("a", 1), adapter("b", 2)]
    for folder in folders:  # under another name they do not pass for a model either
        (tmp_path / f"{folder.name}.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    said = refused(PlanError, tmp_path, "linear", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert "linear would mix A of one adapter with B of another" in said
    assert "BASE+ADAPTER" in said
    with pytest.raises(PlanError, match="ties would mix A"):
        freemerge.merge_state_dicts("ties", weights(folders[0]), [weights(folders[1])])
    # given as adapters they are applied to their base, which is exact
    freemerge.merge("linear", experts=folders, out=tmp_path / "applied")
    expected = freemerge.merge_state_dicts("linear", None, [tensors_in(f"{base}+{folder}") for folder in folders])
    for name, array in tensors_in(tmp_path / "applied").items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_models_are_not_merged_as_adapters(tmp_path, base, adapter):
    one = adapter("a")
    assert "holds no adapter_model" in refused(CheckpointError, tmp_path, "copa", [one, base])
    assert "merges adapters alone" in refused(RecipeError, tmp_path, "copa", [one], base=base)
    with freemerge.Session(None, [f"{base}+{one}"]) as session, pytest.raises(PlanError, match="no LoRA adapter"):
        session.merge("copa")


def test_several_adapters_in_one_file(tmp_path, adapter):
    both = adapter("a")
    tensors = weights(both)
    named = {key.replace(".weight", f".{name}.weight"): array for key, array in tensors.items() for name in ("x", "y")}
    write_safetensors(both / "adapter_model.safetensors", named)
    assert "holds several adapters (x, y)" in refused(CheckpointError, tmp_path, "copa", [both, adapter("b")])


def test_a_stage_is_no_adapter(tmp_path, base, adapter):
    recipe = f"""
name: merged
merge_method: copa
models: [{{model: {adapter("a")}}}, {{model: {adapter("b")}}}]
---
merge_method: linear
models: [{{model: merged}}, {{model: {base}}}]
"""
    with pytest.raises(RecipeError, match="give it a recipe of one document"):
        freemerge.merge(recipe, out=tmp_path / "out")
