"""LoRA adapters on a base, read as one model: every option of PEFT's, exactly, and every way they can fail to fit."""

import json

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.low_rank import BLOCK
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.source import split_adapters
from freemerge.errors import ChangedInputError, CheckpointError
from freemerge.inspect import inspect_models
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import from_gpu, tiny_llama, tiny_llama_config, tiny_vit, write_checkpoint, write_safetensors

LAYER = "model.layers.0"
Q, UP, EMBED = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", "model.embed_tokens"
PREFIX = "base_model.model."


def dyadic(shape, seed, dtype=np.float32):
    """Multiples of 1/16: their products and sums are exact in float32, in any order."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 16).astype(dtype)


def low_rank(module, shape, rank, seed=0):
    out, *rest = shape
    ones = [1] * (len(rest) - 1)
    return {
        f"{PREFIX}{module}.lora_A.weight": dyadic((rank, *rest), seed),
        f"{PREFIX}{module}.lora_B.weight": dyadic((out, rank, *ones), seed + 1),
    }


def delta(tensors, module):
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


@pytest.fixture
def base(tmp_path):
    tensors = {name: dyadic(array.shape, i) for i, (name, array) in enumerate(tiny_llama(0).items())}
    write_checkpoint(tmp_path / "llama", tensors, config=tiny_llama_config())
    return tensors


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter directory."""

    def write(tensors, name="adapter", file="adapter_model.safetensors", **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        write_safetensors(folder / file, tensors)
        return folder

    return write


def adapted(tmp_path, *names, model="llama"):
    return open_checkpoint("+".join(str(tmp_path / name) for name in (model, *names)))


def refusal(tmp_path, *names):
    with pytest.raises(CheckpointError) as caught:
        adapted(tmp_path, *names)
    return str(caught.value)


def assert_changed(found, base, expected):
    """Every tensor bit for bit: those expected, and all others as in the base."""
    assert found.tensors.keys() == base.keys()
    for name, array in base.items():
        np.testing.assert_array_equal(found.read(name), expected.get(name, array), strict=True, err_msg=name)


# -- what PEFT's options mean -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 2}, 0.5)])
def test_a_linear_layer(tmp_path, base, adapter, options, scaling):
    tensors = low_rank(Q, (48, 48), 4)
    adapter(tensors, **options)
    expected = {f"{Q}.weight": base[f"{Q}.weight"] + np.float32(scaling) * delta(tensors, Q)}
    assert_changed(adapted(tmp_path, "adapter"), base, expected)


def test_the_result_is_rounded_once_to_the_dtype_of_the_base(tmp_path, base, adapter):
    halved = {name: array.astype(BFLOAT16) for name, array in base.items()}
    write_checkpoint(tmp_path / "half", halved)
    tensors = low_rank(Q, (48, 48), 4)
    adapter(tensors)
    expected = (base[f"{Q}.weight"] + 2 * delta(tensors, Q)).astype(BFLOAT16)
    assert_changed(adapted(tmp_path, "adapter", model="half"), halved, {f"{Q}.weight": expected})


def test_patterns_of_rank_and_alpha_go_by_the_end_of_the_path(tmp_path, base, adapter):
    other = Q.replace("layers.0", "layers.1")
    tensors = low_rank(Q, (48, 48), 8) | low_rank(other, (48, 48), 4, 5) | low_rank(UP, (80, 48), 2, 7)
    adapter(
        tensors,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 8, "up_proj": 2, "proj": 16},
        alpha_pattern={"up_proj": 16},
    )
    scalings = {Q: 1.0, other: 2.0, UP: 8.0}
    expected = {f"{m}.weight": base[f"{m}.weight"] + np.float32(s) * delta(tensors, m) for m, s in scalings.items()}
    assert_changed(adapted(tmp_path, "adapter"), base, expected)


def test_fan_in_fan_out_means_stored_transposed(tmp_path, base, adapter):
    tensors = low_rank(UP, (48, 80), 4)
    adapter(tensors, fan_in_fan_out=True)
    expected = {f"{UP}.weight": base[f"{UP}.weight"] + 2 * delta(tensors, UP).T}
    assert_changed(adapted(tmp_path, "adapter"), base, expected)


def test_embeddings(tmp_path, base, adapter):
    a, b = dyadic((4, 160), 1), dyadic((48, 4), 2)
    adapter({f"{PREFIX}{EMBED}.lora_embedding_A": a, f"{PREFIX}{EMBED}.lora_embedding_B": b})
    expected = {f"{EMBED}.weight": base[f"{EMBED}.weight"] + 2 * (b @ a).T}
    assert_changed(adapted(tmp_path, "adapter"), base, expected)


def test_modules_to_save_replace_whole_tensors_and_updates_come_on_top(tmp_path, base, adapter):
    head, norm, q = dyadic((160, 48), 1, BFLOAT16), dyadic(48, 2), dyadic((48, 48), 3)
    tensors = low_rank(Q, (48, 48), 4) | {
        f"{PREFIX}lm_head.modules_to_save.default.weight": head,
        f"{PREFIX}model.norm.weight": norm,
        f"{PREFIX}{Q}.base_layer.weight": q,
    }
    adapter(tensors, modules_to_save=["lm_head", "norm"])
    expected = {
        "lm_head.weight": head.astype(np.float32),
        "model.norm.weight": norm,
        f"{Q}.weight": q + 2 * delta(tensors, Q),
    }
    assert_changed(adapted(tmp_path, "adapter"), base, expected)


@pytest.mark.parametrize("name", ["attention.attention.query", "attention.attention.query.base_layer"])
def test_biases_are_replaced_or_added_to(tmp_path, adapter, name):
    base = tiny_vit(0)
    write_checkpoint(tmp_path / "vit", base)
    query = "vit.encoder.layer.0.attention.attention.query"
    value = query.replace("query", "value")
    bias, added = dyadic(32, 1), dyadic(32, 2)
    tensors = low_rank(value, (32, 32), 4)
    adapter(
        tensors | {f"{PREFIX}vit.encoder.layer.0.{name}.bias": bias, f"{PREFIX}{value}.lora_B.bias": added},
        bias="all",
        lora_bias=True,
    )
    found = adapted(tmp_path, "adapter", model="vit")
    np.testing.assert_array_equal(found.read(f"{query}.bias"), bias)
    np.testing.assert_array_equal(found.read(f"{value}.bias"), base[f"{value}.bias"] + 2 * added)
    np.testing.assert_array_equal(
        found.read(f"{value}.weight"),
        (base[f"{value}.weight"].astype(np.float64) + 2 * delta(tensors, value)).astype("f4"),
    )


def test_convolutions(tmp_path, adapter):
    base = {name: dyadic(array.shape, 0) for name, array in tiny_vit(0).items()}
    write_checkpoint(tmp_path / "vit", base)
    name = "vit.embeddings.patch_embeddings.projection"
    tensors = low_rank(name, (32, 3, 4, 4), 4)
    adapter(tensors)
    expected = {f"{name}.weight": base[f"{name}.weight"] + 2 * delta(tensors, name).reshape(32, 3, 4, 4)}
    assert_changed(adapted(tmp_path, "adapter", model="vit"), base, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("suffix", ["", ".default.weight"])
def test_dora_scales_what_feeds_each_output_to_its_magnitude(tmp_path, base, adapter, transposed, suffix):
    tensors = low_rank(UP, (48, 80) if transposed else (80, 48), 4)
    magnitude = np.linspace(1, 2, 48 if transposed else 80, dtype=np.float32)
    named = {key.replace(".weight", suffix or ".weight"): array for key, array in tensors.items()}
    named[f"{PREFIX}{UP}.lora_magnitude_vector{suffix}"] = magnitude
    adapter(named, use_dora=True, fan_in_fan_out=transposed)
    weight = base[f"{UP}.weight"].astype(np.float64)
    moved = (weight.T if transposed else weight) + 2 * delta(tensors, UP)
    expected = moved * (magnitude / np.linalg.norm(moved, axis=1))[:, None]
    found = adapted(tmp_path, "adapter").read(f"{UP}.weight")
    # the norm, the quotient and the product are each rounded to float32
    np.testing.assert_allclose(found, expected.T if transposed else expected, rtol=4 * 2**-24)


def test_several_adapters_are_applied_in_order_and_rounded_once(tmp_path, adapter):
    base = {f"{Q}.weight": np.ones((48, 48), BFLOAT16)}
    write_checkpoint(tmp_path / "llama", base)
    small = {
        f"{PREFIX}{Q}.lora_A.weight": np.full((4, 48), 2**-7, np.float32),
        f"{PREFIX}{Q}.lora_B.weight": np.full((48, 4), 2**-5, np.float32),
    }  # adds 2^-9, a quarter of an ulp: once it is rounded away, twice it is a tie and to even, three times it counts
    for name in "abc":
        adapter(small, name)
    assert np.all(adapted(tmp_path, "a").read(f"{Q}.weight") == 1)
    assert np.all(adapted(tmp_path, "a", "b", "c").read(f"{Q}.weight") == BFLOAT16.type(1 + 2**-7))


def test_large_tensors_are_made_in_blocks_that_any_run_shares(tmp_path, adapter):
    shape = (3, BLOCK // 2 + 5)
    rng = np.random.default_rng(0)
    base = {"w.weight": rng.standard_normal(shape).astype(np.float32), "v.weight": np.ones((70, BLOCK // 32), "f4")}
    write_checkpoint(tmp_path / "llama", base)
    tensors = {}
    for module in "wv":
        out, width = base[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((4, width)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((out, 4)).astype(np.float32)
    adapter(tensors)
    found = adapted(tmp_path, "adapter")
    for name in base:
        whole = found.read(name)
        a, b = (tensors[name.replace("weight", f"lora_{part}.weight")].astype(np.float64) for part in "AB")
        # a sum of five float32 terms of size one or so
        np.testing.assert_allclose(whole, base[name] + 2 * b @ a, rtol=0, atol=1e-5)
        for begin, end in ((0, whole.size), (1, 2), (whole.size // 3, whole.size - 7), (5, 5)):
            np.testing.assert_array_equal(found.read_run(name, begin, end), whole.reshape(-1)[begin:end], strict=True)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shorter", ["base", "adapter"])
def test_prefixes_may_differ(tmp_path, base, adapter, shorter):
    tensors = low_rank(Q, (48, 48), 4)
    expected = base[f"{Q}.weight"] + 2 * delta(tensors, Q)
    longer = base if shorter == "base" else tensors
    stripped = {name.replace("model.layers", "layers"): array for name, array in longer.items()}
    if shorter == "base":
        write_checkpoint(tmp_path / "llama", stripped)
    adapter(tensors if shorter == "base" else stripped)
    name = f"{Q}.weight" if shorter == "adapter" else f"{Q}.weight".removeprefix("model.")
    np.testing.assert_array_equal(adapted(tmp_path, "adapter").read(name), expected)


def test_a_name_that_could_mean_several_tensors_is_refused(tmp_path, adapter):
    write_checkpoint(tmp_path / "llama", {f"{side}.q.weight": np.zeros((4, 4), "f4") for side in ("enc", "dec")})
    adapter(low_rank("q", (4, 4), 4))
    assert "could be meant" in refusal(tmp_path, "adapter")


def test_a_plus_in_a_path_that_exists_is_part_of_it(tmp_path):
    (tmp_path / "a+b").mkdir()
    there = str(tmp_path / "a+b")
    assert split_adapters(there) == (there, [])
    assert split_adapters(f"org/x@main+{there}+c") == ("org/x@main", [there, "c"])
    assert split_adapters(f"{there}+{there}") == (there, [there])
    assert split_adapters("+x+") == ("+x+", [])


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_said_at_once(tmp_path, base, adapter):
    tensors = (
        low_rank(Q, (48, 48), 2)
        | low_rank(UP, (48, 80), 4)
        | low_rank("model.layers.7.mlp.up_proj", (80, 48), 4)
        | {f"{PREFIX}model.norm.weight": dyadic(47, 0), f"{PREFIX}score.weight": dyadic((2, 48), 0)}
        | {f"{PREFIX}{LAYER}.mlp.gate_proj.lora_A.weight": dyadic((4, 48), 0)}
    )
    adapter(tensors)
    text = refusal(tmp_path, "adapter")
    for said in [
        "6 problems",
        "[2, 48], but the configuration gives it rank 4",
        "lora_A.weight: [4, 80], base_model.model.model.layers.0.mlp.up_proj.lora_B.weight: [48, 4]; ",
        "model.layers.0.mlp.up_proj.weight is [80, 48] in",
        "has no model.layers.7.mlp.up_proj.weight",
        "norm.weight: [47]; model.norm.weight is [48] in",
        "has no score.weight",
        "model.layers.0.mlp.gate_proj: an A without a B",
    ]:
        assert said in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not read"),
        ({"peft_type": "ADALORA"}, "Adapters of peft_type LORA are read"),
        ({"target_parameters": ["experts.w"]}, "adapters of bare parameters (target_parameters) are not read"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"init_lora_weights": "pissa_niter_16"}, "the base was changed too"),
        ({"r": 0}, "r: a rank is a whole number from 1 on, not 0"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": {"x": "8"}}, "alpha_pattern[x]: an alpha is a number"),
        ({"use_dora": True}, "there is no magnitude"),
    ],
)
def test_refuses_what_it_would_get_wrong(tmp_path, base, adapter, config, said):
    adapter(low_rank(Q, (48, 48), 4), **config)
    assert said in refusal(tmp_path, "adapter")


def test_two_adapters_in_one_file_are_never_mixed(tmp_path, base, adapter):
    first, second = low_rank(Q, (48, 48), 4), low_rank(Q, (48, 48), 4, 8)
    half = {key.replace("lora_A.", "lora_A.math."): array for key, array in first.items() if "lora_A" in key}
    adapter(half | {key.replace("lora_B.", "lora_B.code."): array for key, array in second.items() if "lora_B" in key})
    assert "holds several adapters (code, math)" in refusal(tmp_path, "adapter")


def test_a_tied_head_has_no_adapter_of_its_own(tmp_path, adapter):
    tensors = tiny_llama(0, tie_word_embeddings=True)
    write_checkpoint(tmp_path / "llama", tensors, config=tiny_llama_config(tie_word_embeddings=True))
    adapter(low_rank("lm_head", (160, 48), 4))
    assert "tied to the embedding there" in refusal(tmp_path, "adapter")


@pytest.mark.parametrize(("damage", "said"), [("gone", "adapter_config.json cannot be read"), ("[]", "is not a map")])
def test_a_broken_configuration_is_named(tmp_path, base, adapter, damage, said):
    path = adapter(low_rank(Q, (48, 48), 4)) / "adapter_config.json"
    path.unlink() if damage == "gone" else path.write_text(damage)
    assert said in refusal(tmp_path, "adapter")


def test_what_follows_a_plus_is_an_adapter(tmp_path, base):
    assert "holds no adapter_model.safetensors" in refusal(tmp_path, "llama")


# -- an adapter alone ----------------------------------------------------------------------------------------------


def test_an_adapter_alone_goes_on_the_model_it_names(tmp_path, base, adapter):
    tensors = low_rank(Q, (48, 48), 4)
    folder = adapter(tensors, base_model_name_or_path=str(tmp_path / "llama"))
    expected = {f"{Q}.weight": base[f"{Q}.weight"] + 2 * delta(tensors, Q)}
    assert_changed(open_checkpoint(folder), base, expected)
    assert_changed(open_checkpoint(folder / "adapter_model.safetensors", base="nowhere"), base, expected)


@pytest.mark.parametrize("named", [None, "no/such/place"])
def test_an_adapter_alone_goes_on_the_base_where_its_own_is_not_there(tmp_path, base, adapter, named):
    tensors = low_rank(Q, (48, 48), 4)
    folder = adapter(tensors, base_model_name_or_path=named)
    found = open_checkpoint(folder, base=str(tmp_path / "llama"))
    assert_changed(found, base, {f"{Q}.weight": base[f"{Q}.weight"] + 2 * delta(tensors, Q)})
    assert found.label == f"{tmp_path / 'llama'}+{folder}"
    with pytest.raises(CheckpointError, match="Write MODEL\\+ADAPTER"):
        open_checkpoint(folder)


# -- merges --------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path, adapter):
    """Folders of a bfloat16 base, of two adapters, and of the same two as whole models."""
    base = tiny_llama(0, dtype=BFLOAT16)
    config = tiny_llama_config(torch_dtype="bfloat16")
    write_checkpoint(tmp_path / "base", base, config=config)
    rng = np.random.default_rng(1)
    for name in ("math", "code"):
        tensors = {}
        for module in (Q, UP, f"{LAYER}.mlp.down_proj"):
            out, width = base[f"{module}.weight"].shape
            tensors[f"{PREFIX}{module}.lora_A.weight"] = rng.standard_normal((4, width)).astype(np.float32)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = 0.02 * rng.standard_normal((out, 4)).astype(np.float32)
        adapter(tensors, name)
        with adapted(tmp_path, name, model="base") as found:
            whole = {key: np.array(found.read(key)) for key in found.tensors}
        write_checkpoint(tmp_path / f"{name}-whole", whole, config=config)
    return tmp_path


def read_all(folder):
    with open_checkpoint(folder) as found:
        return {name: found.read(name).tobytes() for name in found.tensors}


@pytest.mark.parametrize("method", ["task_arithmetic", "fr", "average", "free"])
def test_merges_of_adapters_equal_those_of_whole_models(zoo, method):
    options = {"fsync": False, "threads": 1}
    base = str(zoo / "base")
    whole = {name: str(zoo / f"{name}-whole") for name in ("math", "code")}
    applied = {"math": f"{base}+{zoo / 'math'}", "code": str(zoo / "code")}
    used = None if method == "average" else base
    if used is None:
        applied["code"] = f"{base}+{zoo / 'code'}"
    freemerge.merge(method, used, whole, zoo / "expected", **options)
    result = freemerge.merge(method, used, applied, zoo / "found", **options)
    assert read_all(zoo / "found") == read_all(zoo / "expected")
    assert not result.warnings
    for expert in result.experts:
        ours, theirs = (zoo / out / "experts" / f"{expert}.safetensors" for out in ("found", "expected"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_base_may_have_an_adapter_too(zoo):
    freemerge.merge(
        "task_arithmetic", f"{zoo / 'base'}+{zoo / 'math'}", [str(zoo / "code-whole")], zoo / "a", fsync=False
    )
    freemerge.merge("task_arithmetic", str(zoo / "math-whole"), [str(zoo / "code-whole")], zoo / "b", fsync=False)
    assert read_all(zoo / "a") == read_all(zoo / "b")


def test_a_session_takes_adapters(zoo):
    with freemerge.Session(str(zoo / "base"), {"math": f"{zoo / 'base'}+{zoo / 'math'}"}) as session:
        found = session.merge("task_arithmetic", scaling=1.0)
    assert from_gpu(found[f"{Q}.weight"]).tobytes() == read_all(zoo / "math-whole")[f"{Q}.weight"]


def test_a_recipe_names_adapters_as_mergekit_does(zoo):
    recipe = f"""
merge_method: task_arithmetic
base_model: {zoo / "base"}
models:
  - model: {zoo / "base"}+{zoo / "math"}
    parameters: {{weight: 1.0}}
  - model: {{model: {{path: {zoo / "base"}}}, lora: {{path: {zoo / "code"}}}}}
    parameters: {{weight: 0.5}}
"""
    result = freemerge.merge(recipe, out=zoo / "out", fsync=False)
    card = (zoo / "out" / "README.md").read_text()
    assert "base_model:\n- base\n- math\n- code\n" in card
    manifest = json.loads((zoo / "out" / "freemerge.json").read_text())
    assert [facts["name"] for facts in manifest["inputs"]] == ["base", "base+math", "base+code"]
    assert "adapter 1/adapter_config.json" in manifest["inputs"][1]["files"]
    assert result.tensors == 21


def test_what_adapters_take_in_memory_is_in_the_plan(zoo):
    experts = [str(zoo / "math"), str(zoo / "code-whole")]
    plan = freemerge.merge("task_arithmetic", str(zoo / "base"), experts, dry_run=True)
    made = {task.name: task.made for task in plan.tasks if task.made}
    assert made == {f"{m}.weight": 48 * side * 2 for m, side in ((Q, 48), (UP, 80), (f"{LAYER}.mlp.down_proj", 80))}


def test_a_changed_adapter_is_noticed(zoo):
    found = adapted(zoo, "math", model="base")
    before = found.fingerprint()
    path = zoo / "math" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    with pytest.raises(ChangedInputError, match=r"adapter_config\.json changed"):
        found.check_unchanged()
    assert adapted(zoo, "math", model="base").fingerprint() != before


def test_a_merge_in_pieces_equals_that_of_the_whole_model(tmp_path, adapter):
    shape = (1100, 2000)  # more than a piece of 4 MiB
    rng = np.random.default_rng(0)
    base = {"w.weight": rng.standard_normal(shape).astype(BFLOAT16)}
    write_checkpoint(tmp_path / "llama", base)
    tensors = {
        "w.lora_A.weight": rng.standard_normal((4, 2000)).astype(np.float32),
        "w.lora_B.weight": rng.standard_normal((1100, 4)).astype(np.float32),
    }
    places = [str(tmp_path / "llama"), [str(adapter(tensors))]]
    with adapted(tmp_path, "adapter") as found:
        write_checkpoint(tmp_path / "whole", {"w.weight": np.array(found.read("w.weight"))})
    freemerge.merge("task_arithmetic", *places, tmp_path / "found", fsync=False)
    freemerge.merge("task_arithmetic", places[0], [str(tmp_path / "whole")], tmp_path / "expected", fsync=False)
    assert read_all(tmp_path / "found") == read_all(tmp_path / "expected")


@pytest.mark.parametrize("method", ["task_arithmetic", "fr"])
def test_adapters_are_merged_on_a_gpu_too(zoo, gpu_calls, method):
    whole, applied = ([str(zoo / name) for name in names] for names in (("math-whole", "code-whole"), ("math", "code")))
    options = {"device": "interpreter", "fsync": False}
    freemerge.merge(method, str(zoo / "base"), applied, zoo / "found", **options)
    freemerge.merge(method, str(zoo / "base"), whole, zoo / "expected", **options)
    assert gpu_calls
    assert read_all(zoo / "found") == read_all(zoo / "expected")


def test_adapters_are_inspected(zoo):
    rows = {row.tensor: row for row in inspect_models([str(zoo / "math")], str(zoo / "base"))}
    assert rows[f"{Q}.weight"].rms > 0
    assert rows["lm_head.weight"].rms == 0


def test_slices_take_adapters(zoo):
    base, math = str(zoo / "base"), f"{zoo / 'base'}+{zoo / 'math'}"
    for out, model in (("found", math), ("expected", str(zoo / "math-whole"))):
        sources = [[{"model": model, "layer_range": [0, 1]}], [{"model": base, "layer_range": [0, 2]}]]
        recipe = {"merge_method": "passthrough", "slices": [{"sources": source} for source in sources]}
        freemerge.merge(json.dumps(recipe), out=zoo / out, fsync=False)
    assert read_all(zoo / "found") == read_all(zoo / "expected")


def test_stages_take_adapters_alone(zoo):
    documents = [
        {
            "name": "blend",
            "merge_method": "task_arithmetic",
            "base_model": str(zoo / "base"),
            "models": [{"model": str(zoo / "math")}],
        },
        {"merge_method": "linear", "models": [{"model": "blend"}, {"model": str(zoo / "code-whole")}]},
    ]
    documents[1]["parameters"] = {"weight": 0.5}
    recipe = "\n---\n".join(map(json.dumps, documents))
    freemerge.merge(recipe, out=zoo / "found", fsync=False)
    freemerge.merge(recipe.replace(f'{zoo / "math"}"', f'{zoo / "math-whole"}"'), out=zoo / "expected", fsync=False)
    assert read_all(zoo / "found") == read_all(zoo / "expected")
