"""An adapter cut out of a full fine-tune: exact where the rank suffices, nearest where not, and loadable by PEFT."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from freemerge import cli
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError, InputError, OutputError, PlanError
from freemerge.experts.lora import extract_adapter
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, tiny_vit, write_checkpoint

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
OTHERS = ("model.embed_tokens.weight", "model.norm.weight")


def moved(array, seed, rank=None, size=0.05):
    """The array with a normal change on it, of `rank` if given."""
    if rank is None:
        change = random_array(array.shape, np.float32, seed)
    else:
        change = random_array((len(array), rank), np.float32, seed) @ random_array(
            (rank, array.shape[1]), np.float32, -seed % 99
        )
    return (array.astype(np.float32) + size * change).astype(array.dtype)


@pytest.fixture
def models(tmp_path):
    """A base, and a fine-tune with two matrices, an embedding and a norm changed: in folders, and as tensors."""
    base = tiny_llama(0)
    tuned = base | {Q: moved(base[Q], 1, rank=3), UP: moved(base[UP], 2)}
    tuned |= {name: moved(base[name], 3) for name in OTHERS}
    write_checkpoint(tmp_path / "base", base, config=tiny_llama_config(), shards=2)
    write_checkpoint(tmp_path / "tuned", tuned, config=tiny_llama_config())
    return base, tuned


def extract(tmp_path, rank, **options):
    return extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=rank, fsync=False, **options)


def read_back(tmp_path):
    with open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'out'}") as found:
        return {name: np.array(found.read(name)) for name in found.tensors}


def test_the_fine_tune_comes_back_as_nearly_as_the_rank_allows(tmp_path, models):
    base, tuned = models
    rows = {row.tensor: row for row in extract(tmp_path, 4)}
    assert {name: row.kept for name, row in rows.items()} == {Q: "lora", UP: "lora"} | dict.fromkeys(OTHERS, "whole")
    found = read_back(tmp_path)
    for name in base.keys() - {Q, UP}:
        np.testing.assert_array_equal(found[name], tuned[name])
    # rank 3: what is left is rounding of weights that are not larger than one
    np.testing.assert_allclose(found[Q], tuned[Q], rtol=0, atol=2**-23)
    change = tuned[UP].astype(np.float64) - base[UP]
    values = np.linalg.svd(change, compute_uv=False)
    best = np.linalg.norm(values[4:]) / np.linalg.norm(values)
    assert rows[UP].error == pytest.approx(best, rel=1e-5)
    assert np.linalg.norm(found[UP] - tuned[UP]) / np.linalg.norm(change) == pytest.approx(best, rel=1e-4)
    assert rows[Q].error < 1e-5


def test_the_configuration_says_what_peft_asks_for(tmp_path, models):
    extract(tmp_path, 4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 4, "CAUSAL_LM")
    assert config["target_modules"] == [Q.removesuffix(".weight"), UP.removesuffix(".weight")]
    assert config["modules_to_save"] == ["model.embed_tokens", "model.norm"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_matrix_smaller_than_its_factors_is_kept_whole(tmp_path, models):
    rows = {row.tensor: row for row in extract(tmp_path, 24)}
    assert (rows[Q].kept, rows[UP].kept) == ("whole", "lora")  # 24 * (48 + 48) = 48 * 48


def test_biases_and_convolutions(tmp_path):
    base = tiny_vit(0, dtype=BFLOAT16)
    layer = "vit.encoder.layer.0.attention.attention"
    changed = [f"{layer}.query.weight", f"{layer}.query.bias", f"{layer}.key.bias"]
    changed.append("vit.embeddings.patch_embeddings.projection.weight")
    tuned = base | {name: moved(base[name], i) for i, name in enumerate(changed)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    rows = {row.tensor: row.kept for row in extract(tmp_path, 4)}
    siblings = [f"{layer}.key.weight", "vit.embeddings.patch_embeddings.projection.bias"]
    assert rows == {changed[0]: "lora"} | dict.fromkeys([*changed[1:], *siblings], "whole")
    found = read_back(tmp_path)
    for name in base.keys() - {changed[0]}:
        np.testing.assert_array_equal(found[name], tuned[name])


def test_matrices_stored_transposed_are_known_by_their_biases(tmp_path):
    base = {
        "h.0.c_attn.weight": random_array((16, 48), np.float32, 0),
        "h.0.c_attn.bias": np.zeros(48, np.float32),
        "h.0.c_proj.weight": random_array((16, 16), np.float32, 1),
        "h.0.c_proj.bias": np.zeros(16, np.float32),
        "head.weight": random_array((40, 16), np.float32, 2),
    }
    tuned = {
        name: moved(array, i, rank=2) if array.ndim == 2 else array for i, (name, array) in enumerate(base.items())
    }
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    rows = {row.tensor: row.kept for row in extract(tmp_path, 2)}
    assert rows == {"h.0.c_attn.weight": "lora", "h.0.c_proj.weight": "lora", "head.weight": "whole"}
    with open_checkpoint(tmp_path / "out" / "adapter_model.safetensors", base=str(tmp_path / "base")) as found:
        for name, array in tuned.items():
            np.testing.assert_allclose(found.read(name), array, rtol=0, atol=2**-20)


def test_what_no_adapter_can_hold_is_refused_or_left_out(tmp_path):
    base = tiny_vit(0)
    token, query = "vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight"
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", base | {name: moved(base[name], 1) for name in (token, query)})
    with pytest.raises(InputError, match=f"{token}: changed, but no layer's weight or bias"):
        extract(tmp_path, 4)
    assert not (tmp_path / "out").exists()
    rows = {row.tensor: (row.kept, row.error) for row in extract(tmp_path, 4, leave_out=True)}
    assert rows[token] == ("left out", 1.0)
    np.testing.assert_array_equal(read_back(tmp_path)[token], base[token])


def test_bad_input_is_refused_and_nothing_is_written(tmp_path, models):
    base, tuned = models
    with pytest.raises(InputError, match="rank 0"):
        extract(tmp_path, 0)
    write_checkpoint(tmp_path / "tuned", base)
    with pytest.raises(InputError, match="no tensor has changed"):
        extract(tmp_path, 4)
    write_checkpoint(tmp_path / "tuned", tuned | {Q: np.full_like(tuned[Q], np.nan)})
    with pytest.raises(CheckpointError, match=f"{Q}: NaN or Inf"):
        extract(tmp_path, 4)
    write_checkpoint(tmp_path / "tuned", tuned | {Q: tuned[Q][1:]})
    with pytest.raises(PlanError, match=Q):
        extract(tmp_path, 4)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_an_output_is_replaced_only_when_asked(tmp_path, models):
    extract(tmp_path, 2)
    with pytest.raises(OutputError, match="overwrite"):
        extract(tmp_path, 4)
    extract(tmp_path, 4, overwrite=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_the_command_prints_the_errors(tmp_path, models):
    places = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    run = CliRunner().invoke(cli.app, ["experts", "extract", "--lora", "4", *places, "--no-fsync"])
    assert run.exit_code == 0
    assert any(line.split()[0] == UP and "lora" in line for line in run.stdout.splitlines())
    again = CliRunner().invoke(cli.app, ["experts", "extract", "--lora", "4", *places, "--overwrite", "--json"])
    tensors = {row["tensor"]: row for row in json.loads(again.stdout)["tensors"]}
    assert 0 < tensors[UP]["error"] < 1
    assert tensors[OTHERS[0]]["kept"] == "whole"


@pytest.mark.parametrize(
    "arguments", [["--lora", "4", "a", "b"], ["a", "b", "c"], ["--lora", "4", "a", "b", "c", "--name", "x"]]
)
def test_the_two_forms_of_the_command_are_kept_apart(arguments):
    run = CliRunner().invoke(cli.app, ["experts", "extract", *arguments])
    assert run.exit_code == 2
    assert "--lora" in run.stderr


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it(tmp_path, models):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    extract(tmp_path, 4)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    found = read_back(tmp_path)
    for name, array in found.items():
        # a product of rank 4 in float32, summed in another order
        np.testing.assert_allclose(merged[name].numpy(), array, rtol=0, atol=2**-22, err_msg=name)
