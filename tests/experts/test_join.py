"""Adapters joined into one: the weighted sum of their updates, whatever their ranks and scalings; what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from freemerge import cli
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import InputError
from freemerge.experts.join import join_adapters
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint, write_safetensors

LAYER = "model.layers.{}.self_attn.q_proj"
Q, UP, WORDS = LAYER.format(0), "model.layers.1.mlp.up_proj", "model.embed_tokens"
PREFIX = "base_model.model."


def factors(module, rank, seed, dtype=np.float32):
    height, width = {Q: (48, 48), UP: (80, 48), WORDS: (48, 160)}.get(module, (48, 48))
    a, b = random_array((rank, width), dtype, seed), random_array((height, rank), dtype, seed + 1)
    stem = "lora_embedding_{}" if module == WORDS else "lora_{}.weight"
    return {f"{PREFIX}{module}.{stem.format('A')}": a, f"{PREFIX}{module}.{stem.format('B')}": b}


@pytest.fixture
def base(tmp_path):
    tensors = tiny_llama(0)
    write_checkpoint(tmp_path / "llama", tensors, config=tiny_llama_config())
    return tensors


@pytest.fixture
def adapter(tmp_path):
    def write(name, tensors, **config):
        (tmp_path / name).mkdir()
        content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content))
        write_safetensors(tmp_path / name / "adapter_model.safetensors", tensors)
        return tmp_path / name

    return write


def read(path):
    with open_checkpoint(path) as opened:
        return {name: np.array(opened.read(name), float) for name in opened.tensors}


def assert_joined(tmp_path, base, adapters, out):
    start, found = {name: array.astype(float) for name, array in base.items()}, read(f"{tmp_path / 'llama'}+{out}")
    parts = [(weight, read(f"{tmp_path / 'llama'}+{path}")) for path, weight in adapters.items()]
    changed = 0
    for name, array in start.items():
        expected = array + sum(weight * (part[name] - array) for weight, part in parts)
        changed += np.any(expected != array)
        # float32 weights near 1, updates of several units
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5, err_msg=name)
    assert changed


def test_ranks_scalings_and_modules_may_differ(tmp_path, base, adapter):
    one = adapter("one", factors(Q, 4, 1) | factors(UP, 4, 2))
    two = adapter(
        "two", factors(Q, 3, 3) | factors(WORDS, 2, 4), r=3, use_rslora=True, rank_pattern={"embed_tokens": 2}
    )
    low = adapter("low", factors(UP, 4, 5, BFLOAT16), lora_alpha=2)
    weights = {one: 0.7, two: -0.5, low: 1.0}
    ranks = join_adapters(weights, tmp_path / "out", fsync=False)
    assert ranks == {Q: 7, UP: 8, WORDS: 2}
    assert_joined(tmp_path, base, weights, tmp_path / "out")


def test_a_sequence_is_a_plain_sum(tmp_path, base, adapter):
    adapters = [
        adapter(name, factors(Q, 4, seed) | factors(LAYER.format(1), 4, seed)) for seed, name in enumerate("ab")
    ]
    join_adapters(adapters, tmp_path / "out", fsync=False)
    assert_joined(tmp_path, base, dict.fromkeys(adapters, 1.0), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})


def test_what_is_not_exact_is_refused_all_at_once(tmp_path, adapter):
    one = adapter("one", factors(Q, 4, 1))
    dora = factors(Q, 4, 2) | {f"{PREFIX}{Q}.lora_magnitude_vector.weight": np.ones(48, np.float32)}
    two = adapter("two", dora, use_dora=True, fan_in_fan_out=True, base_model_name_or_path="other")
    half = {key: array for key, array in factors(Q, 4, 3).items() if "lora_B" in key}
    whole = adapter("whole", half | {f"{PREFIX}lm_head.weight": np.ones((160, 48), np.float32)})
    wide = adapter("wide", {key: np.tile(array, (1, 2)) for key, array in factors(Q, 4, 4).items()})
    with pytest.raises(InputError) as caught:
        join_adapters([one, two, whole, wide], tmp_path / "out")
    for said in (
        "two: a DoRA adapter",
        "fan_in_fan_out: False in",
        "base_model_name_or_path: None in",
        "lm_head.weight",
    ):
        assert said in str(caught.value)
    assert f"wide: {PREFIX}{Q}: of rank 4 and 8, but the configuration says 4" in str(caught.value)
    assert "a B without an A" in str(caught.value)
    assert f"{Q}.lora_A.weight: [4, 48] in {one}, [4, 96] in {wide}" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no adapter is given"):
        join_adapters([], tmp_path / "out")


def test_the_command(tmp_path, base, adapter):
    one, two = adapter("one", factors(Q, 4, 1)), adapter("two", factors(Q, 4, 2))
    run = CliRunner().invoke(cli.app, ["experts", "join", f"{one}=0.25", str(two), "-o", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "1 modules, of rank 8" in run.output
    assert_joined(tmp_path, base, {one: 0.25, two: 1.0}, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it(tmp_path, base, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    one, two = adapter("one", factors(Q, 4, 1) | factors(UP, 4, 2)), adapter("two", factors(UP, 3, 3), r=3)
    join_adapters({one: 0.5, two: 2.0}, tmp_path / "out", fsync=False)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    for name, array in read(f"{tmp_path / 'llama'}+{tmp_path / 'out'}").items():
        np.testing.assert_allclose(merged[name].numpy(), array, rtol=0, atol=1e-5, err_msg=name)
