"""An expert as a LoRA adapter: nearest at its rank, exact where it has that rank, read back as engines do."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import freemerge
from freemerge import cli
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError, InputError, OutputError
from freemerge.experts.apply import apply_expert, find_expert
from freemerge.experts.export import WithExpert, export_adapter
from freemerge.experts.lora import total_error
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


def merged_by(method, folder, *, dtype=np.float32, **parameters):
    """A tiny Llama with two experts, merged."""
    for seed, name in enumerate(("base", "math", "code")):
        write_checkpoint(folder / name, tiny_llama(seed, dtype=dtype, scale=0.1), config=tiny_llama_config())
    sources = {name: folder / name for name in ("math", "code")}
    freemerge.merge(method, base=folder / "base", experts=sources, out=folder / "merged", fsync=False, **parameters)
    return folder / "merged"


def read_all(source):
    with open_checkpoint(source) as found:
        return {name: np.array(found.read(name)).astype(np.float64) for name in found.tensors}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_the_view_reads_what_apply_expert_writes(tmp_path, dtype):
    merged = merged_by("free", tmp_path, dtype=dtype, density=0.1)
    apply_expert(merged, "math", tmp_path / "plain", fsync=False)
    with open_checkpoint(merged) as backbone, open_checkpoint(tmp_path / "plain") as plain:
        view = WithExpert(backbone, find_expert(merged, "math"))
        assert view.tensors.keys() == plain.tensors.keys()
        for name in plain.tensors:
            assert view.read(name).tobytes() == plain.read(name).tobytes()
            assert view.read_run(name, 3, 11).tobytes() == plain.read_run(name, 3, 11).tobytes()


def test_an_expert_comes_back_as_nearly_as_the_rank_allows(tmp_path):
    merged = merged_by("free", tmp_path, density=0.1)
    rows = {row.tensor: row for row in export_adapter(merged, "math", tmp_path / "lora", rank=8, fsync=False)}
    apply_expert(merged, "math", tmp_path / "plain", fsync=False)
    backbone, plain = read_all(merged), read_all(tmp_path / "plain")
    found = read_all(f"{merged}+{tmp_path / 'lora'}")
    change = plain[UP] - backbone[UP]
    values = np.linalg.svd(change, compute_uv=False)
    best = np.linalg.norm(values[8:]) / np.linalg.norm(values)
    assert rows[UP].kept == "lora"
    # float32 weights: the change is known to 2^-24 of them, some 1e-5 of it
    assert rows[UP].error == pytest.approx(best, rel=1e-4)
    assert rows[UP].change == pytest.approx(np.linalg.norm(change), rel=1e-4)
    assert np.linalg.norm(found[UP] - plain[UP]) / np.linalg.norm(change) == pytest.approx(best, rel=1e-3)
    for name, row in rows.items():
        if row.kept == "whole":
            np.testing.assert_array_equal(found[name], plain[name])
    missing = sum(np.linalg.norm(found[name] - plain[name]) ** 2 for name in plain)
    whole = sum(np.linalg.norm(plain[name] - backbone[name]) ** 2 for name in plain)
    assert total_error(list(rows.values())) == pytest.approx(np.sqrt(missing / whole), rel=1e-3)


def test_a_low_rank_expert_is_exact_at_its_rank_in_bfloat16_too(tmp_path):
    merged = merged_by("twin", tmp_path, dtype=BFLOAT16, density=0.15)
    rows = export_adapter(merged, "math", tmp_path / "lora", rank=8, fsync=False)
    low_rank = [row for row in rows if row.kept == "lora"]
    assert low_rank
    # the expert's own difference is cut, not that of weights rounded to 8 bits
    assert max(row.error for row in low_rank) < 1e-4


def test_an_expert_that_replaces_entries(tmp_path):
    merged = merged_by("free", tmp_path, combine="replace", relative_to="base", density=0.1)
    assert find_expert(merged, "math").mode == "replace"
    rows = export_adapter(merged, "math", tmp_path / "lora", rank=15, fsync=False)
    apply_expert(merged, "math", tmp_path / "plain", fsync=False)
    backbone, plain = read_all(merged), read_all(tmp_path / "plain")
    for row in rows:
        assert row.change == pytest.approx(np.linalg.norm(plain[row.tensor] - backbone[row.tensor]), rel=1e-4)


def test_only_linear_layers_for_engines_that_take_no_other(tmp_path):
    merged = merged_by("free", tmp_path, density=0.1)
    rows = export_adapter(merged, "math", tmp_path / "lora", rank=4, only_linear=True, fsync=False)
    assert {row.kept for row in rows} == {"lora", "left out"}
    assert all(row.error == 1.0 for row in rows if row.kept == "left out")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert config["base_model_name_or_path"] == str(merged)
    with open_checkpoint(f"{merged}+{tmp_path / 'lora'}") as found, open_checkpoint(merged) as backbone:
        name = "model.embed_tokens.weight"
        assert found.read(name).tobytes() == backbone.read(name).tobytes()


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    merged = merged_by("free", tmp_path, density=0.1)
    out = tmp_path / "lora"
    with pytest.raises(InputError, match="no expert 'law'; there are: code, math"):
        export_adapter(merged, "law", out, rank=4)
    with pytest.raises(InputError, match="rank 0"):
        export_adapter(merged, "math", out, rank=0)
    with pytest.raises(InputError, match="that a rank of 4000 makes smaller"):
        export_adapter(merged, "math", out, rank=4000)
    out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        export_adapter(merged, "math", out, rank=4)
    out.rmdir()
    manifest = json.loads((merged / "freemerge.json").read_text())
    (merged / "freemerge.json").write_text(json.dumps(manifest | {"backbone": "0" * 32}))
    with pytest.raises(CheckpointError, match="belongs to the backbone"):
        export_adapter(merged, "math", out, rank=4)
    assert not out.exists()


def test_command_line(tmp_path):
    merged = merged_by("free", tmp_path, density=0.1)
    arguments = ["experts", "export", str(merged), "math", str(tmp_path / "lora"), "--lora", "4", "--no-fsync"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    assert "the expert math as a LoRA adapter of rank 4 on" in result.output.replace("\n", " ")
    assert "error 0." in last
    result = CliRunner().invoke(cli.app, [*arguments, "--json", "--overwrite", "--only-linear"])
    facts = json.loads(result.output)
    assert 0 < facts["error"] < 1
    assert {tensor["kept"] for tensor in facts["tensors"]} == {"lora", "left out"}


def in_peft(merged, adapter):
    """PEFT's model of a backbone with an adapter on it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    return peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(merged), adapter).eval()


def answers(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.arange(2, 22).reshape(2, 10)).logits.numpy()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21, transformers 5.23
class TestInPeft:
    def test_at_the_experts_own_rank_outputs_are_those_of_the_expert_in_place(self, tmp_path):
        merged = merged_by("twin", tmp_path, density=0.15)
        rows = export_adapter(merged, "math", tmp_path / "lora", rank=8, fsync=False)
        assert total_error(rows) < 1e-5
        model = freemerge.load(merged)
        backbone = answers(model)
        model.use_expert("math")
        expected, found = answers(model), answers(in_peft(merged, tmp_path / "lora"))
        # two orders of summation in float32, over layers with activations of size 1 to 10
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
        assert np.abs(expected - backbone).max() > 1e-2

    def test_below_it_weights_are_as_far_off_as_the_printed_error_says(self, tmp_path):
        merged = merged_by("free", tmp_path, density=0.1)
        arguments = ["experts", "export", str(merged), "math", str(tmp_path / "lora"), "--lora", "6", "--json"]
        printed = json.loads(CliRunner().invoke(cli.app, arguments).output)
        apply_expert(merged, "math", tmp_path / "plain", fsync=False)
        backbone, plain = read_all(merged), read_all(tmp_path / "plain")
        tuned = in_peft(merged, tmp_path / "lora").merge_and_unload()
        found = {name: tensor.double().numpy() for name, tensor in tuned.state_dict().items()}
        missing = np.sqrt(sum(np.linalg.norm(found[name] - plain[name]) ** 2 for name in plain))
        change = np.sqrt(sum(np.linalg.norm(plain[name] - backbone[name]) ** 2 for name in plain))
        assert 0.05 < printed["error"] < 1
        # float32 weights, in which PEFT adds B A up
        assert missing / change == pytest.approx(printed["error"], rel=1e-3)
        # and the outputs of the adapter beside its layers are those of these weights
        beside = answers(in_peft(merged, tmp_path / "lora"))
        np.testing.assert_allclose(beside, answers(tuned), rtol=2e-4, atol=2e-4)  # as above
        wanted = freemerge.load(merged)
        wanted.use_expert("math")
        nearer, farther = (np.abs(answers(model) - answers(wanted)).mean() for model in (tuned, freemerge.load(merged)))
        assert nearer < farther
