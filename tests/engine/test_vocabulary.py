"""Merges of models with other tokens: every row is that of its token, and what is written fits together."""

import json

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.header import TensorInfo
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.tokenizer import read_tokenizer
from freemerge.errors import PlanError
from freemerge.testing import tiny_llama, tiny_llama_config, tiny_tokenizer, write_checkpoint
from freemerge.token_tensors import token_rows, token_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZERS = {
    "a": tiny_tokenizer(["ab", "th"], ("<|end|>",), "{{ 'a' }}"),
    "b": tiny_tokenizer(["th", "xy"], ("<|start|>", "<|end|>"), "{{ 'b' }}"),
    "c": tiny_tokenizer(["xy", "xyz"], (), "{{ 'b' }}"),
}
TIED = pytest.mark.parametrize("tied", [False, True])


def make(folder, seed, files, *, tied=False, rows=None):
    """A tiny Llama with these tokens, and its tensors."""
    count = len(files["tokenizer.json"]["model"]["vocab"])
    count += sum(token["id"] >= count for token in files["tokenizer.json"]["added_tokens"])
    config = tiny_llama_config(
        vocab_size=rows or count, tie_word_embeddings=tied, hidden_size=16, torch_dtype="float32"
    )
    tensors = tiny_llama(seed, vocab_size=rows or count, tie_word_embeddings=tied, hidden_size=16)
    write_checkpoint(folder, tensors, config=config)
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    return str(folder), tensors


@pytest.fixture
def zoo(tmp_path):
    return {name: make(tmp_path / name, seed, files) for seed, (name, files) in enumerate(TOKENIZERS.items())}


def rows_by_token(zoo, name, tensor=EMBEDDING):
    vocab = read_tokenizer(open_checkpoint(zoo[name][0]).path).vocab
    return {token: zoo[name][1][tensor][number] for token, number in vocab.items()}


def merged(tmp_path, zoo, tokenizer, *, method="linear", base=None, models="abc", weight=(0.5, 0.25, 0.125), **others):
    entries = [{"model": zoo[n][0], "parameters": {"weight": w}} for n, w in zip(models, weight, strict=False)]
    recipe = {"merge_method": method, "models": entries, "parameters": {"normalize": False}, **others}
    recipe |= {"tokenizer": tokenizer} if isinstance(tokenizer, dict) else {"tokenizer_source": tokenizer}
    if base:
        recipe["base_model"] = zoo[base][0]
    text = freemerge.recipe.load_recipe(recipe).to_yaml()
    freemerge.merge(text, out=tmp_path / "out", fsync=False, overwrite=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    vocab = read_tokenizer(tmp_path / "out").vocab
    return checkpoint, vocab, {name: checkpoint.read(name) for name in checkpoint.tensors}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-9)  # sums in another order: an ulp of float32


def test_a_union_fills_what_a_model_lacks_from_those_that_have_it(zoo, tmp_path):
    checkpoint, vocab, found = merged(tmp_path, zoo, "union")
    a, b, c = (rows_by_token(zoo, name) for name in "abc")
    assert set(vocab) == {*a, *b, *c}
    assert [vocab[token] for token in rows_by_token(zoo, "a")] == [*read_tokenizer(tmp_path / "a").vocab.values()]
    assert checkpoint.config["vocab_size"] == len(vocab) == len(found[EMBEDDING]) == len(found[HEAD])
    rows = found[EMBEDDING]
    close(rows[vocab["q"]], 0.5 * a["q"] + 0.25 * b["q"] + 0.125 * c["q"])
    close(rows[vocab["ab"]], 0.875 * a["ab"])  # its only owner's, in all three
    close(rows[vocab["xy"]], 0.5 * (b["xy"] + c["xy"]) / 2 + 0.25 * b["xy"] + 0.125 * c["xy"])
    assert checkpoint.chat_template() == "{{ 'a' }}"
    head = [rows_by_token(zoo, name, HEAD)["xyz"] for name in "c"]
    close(found[HEAD][vocab["xyz"]], 0.875 * head[0])


def test_the_base_fills_what_an_expert_lacks(zoo, tmp_path):
    _, vocab, found = merged(tmp_path, zoo, "union", method="task_arithmetic", base="b", models="ac")
    a, b, c = (rows_by_token(zoo, name) for name in "abc")
    rows = found[EMBEDDING]
    close(rows[vocab["<|start|>"]], b["<|start|>"])
    close(rows[vocab["xy"]], b["xy"] + 0.25 * (c["xy"] - b["xy"]))
    close(rows[vocab["ab"]], a["ab"])  # the base's own row is filled in too: no difference is left


@TIED
def test_padding_is_the_mean_of_all_rows(tmp_path, tied):
    zoo = {name: make(tmp_path / name, seed, TOKENIZERS[name], tied=tied) for seed, name in enumerate("ab")}
    tokenizer = {"source": "base", "pad_to_multiple_of": 16}
    checkpoint, vocab, found = merged(tmp_path, zoo, tokenizer, models="ab")
    rows = found[EMBEDDING]
    assert len(vocab) == 32
    assert len(rows) == 32
    tokenizer["pad_to_multiple_of"] = 20
    checkpoint, vocab, found = merged(tmp_path, zoo, tokenizer, models="ab")
    rows = found[EMBEDDING]
    assert (len(vocab), len(rows), checkpoint.config["vocab_size"]) == (32, 40, 40)
    for padded in rows[32:]:
        np.testing.assert_allclose(padded, rows[:32].astype(np.float64).mean(0), rtol=1e-5, atol=1e-8)
    assert (HEAD in found) is not tied


def test_rules_for_single_tokens(zoo, tmp_path):
    model = {"kind": "model_token", "model": zoo["a"][0]}
    tokens = {
        "<|end|>": {"source": zoo["b"][0], "force": True},
        "xyz": {"source": {**model, "token": "th"}},
        "<|new|>": {"source": {"kind": "zero"}},
        "<|third|>": {"source": {**model, "token_id": 3}},
        "q": {"source": {"kind": "zero"}},
    }
    _, vocab, found = merged(tmp_path, zoo, {"source": "base", "tokens": tokens})
    a, b, c = (rows_by_token(zoo, name) for name in "abc")
    rows = found[EMBEDDING]
    assert set(vocab) == {*a, "xyz", "<|new|>", "<|third|>"}
    close(rows[vocab["<|end|>"]], 0.875 * b["<|end|>"])
    close(rows[vocab["xyz"]], 0.75 * a["th"] + 0.125 * c["xyz"])  # c has it: not forced
    close(rows[vocab["<|new|>"]], np.zeros(16))
    close(rows[vocab["<|third|>"]], 0.875 * zoo["a"][1][EMBEDDING][3])
    close(rows[vocab["q"]], 0.5 * a["q"] + 0.25 * b["q"] + 0.125 * c["q"])  # all have it


def test_rows_beyond_the_tokens_are_left_out_and_tokens_beyond_the_rows(tmp_path):
    zoo = {
        "a": make(tmp_path / "a", 1, TOKENIZERS["a"], rows=40),
        "b": make(tmp_path / "b", 2, TOKENIZERS["b"], rows=31),
    }
    checkpoint, vocab, found = merged(tmp_path, zoo, "base", models="ab")
    assert len(found[EMBEDDING]) == len(vocab) == checkpoint.config["vocab_size"] == 32
    # b's <|start|> and <|end|> have no row
    close(found[EMBEDDING][vocab["<|end|>"]], 0.75 * zoo["a"][1][EMBEDDING][31])
    _, vocab, _ = merged(tmp_path, zoo, zoo["b"][0], models="ab")
    assert "<|start|>" not in vocab
    assert "xy" in vocab


def test_the_tokenizer_of_a_folder_that_is_no_model(zoo, tmp_path):
    (tmp_path / "t").mkdir()
    for name, data in TOKENIZERS["c"].items():
        (tmp_path / "t" / name).write_text(json.dumps(data))
    _, vocab, found = merged(tmp_path, zoo, str(tmp_path / "t"), models="ab")
    close(found[EMBEDDING][vocab["xyz"]], np.zeros(16))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "t/tokenizer.json").read_bytes()


def test_slices_take_rows_from_their_own_models(zoo, tmp_path):
    slices = [
        {"sources": [{"model": zoo[name][0], "layer_range": layers}]} for name, layers in (("a", [0, 2]), ("b", [1, 2]))
    ]
    recipe = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    freemerge.merge(freemerge.recipe.load_recipe(recipe).to_yaml(), out=tmp_path / "out", fsync=False)
    checkpoint, vocab = open_checkpoint(tmp_path / "out"), read_tokenizer(tmp_path / "out").vocab
    embedding, head = checkpoint.read(EMBEDDING), checkpoint.read(HEAD)
    assert (checkpoint.config["vocab_size"], checkpoint.config["num_hidden_layers"]) == (len(vocab), 3)
    close(embedding[vocab["ab"]], rows_by_token(zoo, "a")["ab"])
    close(embedding[vocab["xy"]], np.zeros(16))  # the first slice has no model that knows it
    close(head[vocab["xy"]], rows_by_token(zoo, "b", HEAD)["xy"])
    close(head[vocab["ab"]], np.zeros(16))


def test_a_stage_passes_its_tokenizer_on(zoo, tmp_path):
    text = f"""
name: both
merge_method: linear
models: [{{model: {zoo["a"][0]}}}, {{model: {zoo["b"][0]}}}]
tokenizer_source: union
chat_template: chatml
---
merge_method: task_arithmetic
base_model: both
models: [{{model: {zoo["c"][0]}, parameters: {{weight: 0.5}}}}]
tokenizer_source: base
"""
    planned = freemerge.merge(text, dry_run=True)
    assert dict((task.name, task.shape) for task in planned[None].tasks)[EMBEDDING] == (34, 16)
    freemerge.merge(text, out=tmp_path / "out", fsync=False)
    checkpoint, vocab = open_checkpoint(tmp_path / "out"), read_tokenizer(tmp_path / "out").vocab
    a, b, c = (rows_by_token(zoo, name) for name in "abc")
    assert set(vocab) == {*a, *b}
    close(checkpoint.read(EMBEDDING)[vocab["ab"]], a["ab"])
    close(checkpoint.read(EMBEDDING)[vocab["q"]], 0.25 * (a["q"] + b["q"]) + 0.5 * c["q"])
    assert "<|im_start|>" in checkpoint.chat_template()


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(zoo, tmp_path):
    for name in TOKENIZERS["b"]:
        (tmp_path / "b" / name).unlink()
    recipe = {"merge_method": "linear", "models": [{"model": zoo["a"][0]}, {"model": zoo["b"][0]}]}
    text = freemerge.recipe.load_recipe({**recipe, "tokenizer_source": "base"}).to_yaml()
    plan = freemerge.merge(text, dry_run=True)
    assert plan.warnings == [f"{zoo['b'][0]} has no tokenizer; its tokens are taken to be those of {zoo['a'][0]}"]
    backwards = text.replace("tokenizer_source: base", f"tokenizer_source: {zoo['b'][0]}")
    with pytest.raises(PlanError, match=r"has no tokenizer\.json; leave the tokenizer out"):
        freemerge.merge(backwards, dry_run=True)


def test_what_cannot_be_is_said_at_once(zoo, tmp_path):
    source = {"kind": "model_token", "model": zoo["a"][0]}
    tokens = {
        "x1": {"source": {**source, "token": "nowhere"}},
        "x2": {"source": {**source, "token_id": 32}},
        "x3": {"source": zoo["b"][0]},
    }
    with pytest.raises(PlanError) as caught:
        merged(tmp_path, zoo, {"source": "base", "tokens": tokens})
    for expected in (
        "x1: ",
        "has no token 'nowhere'",
        "x2: ",
        "id 32 is not in it; it has 32 rows",
        "has no token 'x3'",
    ):
        assert expected in str(caught.value)
    assert "3 problems, nothing was written" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_vocabularies_without_a_tokenizer_are_refused_with_the_remedy(zoo):
    recipe = f"merge_method: linear\nmodels: [{{model: {zoo['a'][0]}}}, {{model: {zoo['b'][0]}}}]"
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight.*write `tokenizer_source: base`"):
        freemerge.merge(recipe, dry_run=True)


def test_a_base_that_takes_no_part_is_mentioned(zoo):
    shared = f"base_model: {zoo['a'][0]}\nparameters: {{weight: 0.5}}\ntokenizer_source: base\n"
    recipe = f"merge_method: linear\n{shared}models: [{{model: {zoo['b'][0]}}}]"
    (warning,) = freemerge.merge(recipe, dry_run=True).warnings
    assert "base_model takes no part in linear" in warning
    listed = recipe.replace("models: [", f"models: [{{model: {zoo['a'][0]}}}, ")
    assert freemerge.merge(listed, dry_run=True).warnings == []


def test_less_memory_and_one_thread_give_the_same_bytes(zoo, tmp_path):
    _, _, expected = merged(tmp_path, zoo, "union")
    text = (tmp_path / "out/freemerge.json").read_text()
    recipe = freemerge.recipe.load_recipe(json.loads(text)["recipe"])
    freemerge.merge(recipe.to_yaml(), out=tmp_path / "less", fsync=False, max_memory="256MiB", threads=1)
    assert (tmp_path / "less/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert expected


def test_a_plan_knows_the_tokens_it_was_made_for(zoo, tmp_path):
    recipe = (
        f"merge_method: linear\nmodels: [{{model: {zoo['a'][0]}}}, {{model: {zoo['b'][0]}}}]\ntokenizer_source: union"
    )
    before = freemerge.merge(recipe, dry_run=True).fingerprint
    assert freemerge.merge(recipe, dry_run=True).fingerprint == before
    files = tiny_tokenizer(["th", "xz"], ("<|start|>", "<|end|>"))
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    assert freemerge.merge(recipe, dry_run=True).fingerprint != before


class Headers:
    def __init__(self, shapes, config):
        self.tensors = {name: TensorInfo(np.dtype(np.float32), shape, 0, None) for name, shape in shapes.items()}
        self.config = config


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (
            {"transformer.wte.weight": (50, 8), "transformer.wpe.weight": (64, 8), "h.0.ln.bias": (50,)},
            ["transformer.wte.weight"],
        ),
        (
            {
                "bert.embeddings.word_embeddings.weight": (30, 8),
                "bert.embeddings.position_embeddings.weight": (64, 8),
                "bert.embeddings.token_type_embeddings.weight": (2, 8),
                "cls.predictions.bias": (30,),
                "cls.predictions.decoder.weight": (30, 8),
                "cls.predictions.transform.dense.bias": (8,),
            },
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight"],
        ),
        (
            {
                "shared.weight": (9, 4),
                "encoder.block.0.w": (9, 4),
                "encoder.block.1.w": (9, 4),
                "lm_head.weight": (9, 4),
            },
            ["shared.weight", "lm_head.weight"],
        ),
        (
            {"gpt_neox.embed_in.weight": (9, 4), "embed_out.weight": (9, 4)},
            ["gpt_neox.embed_in.weight", "embed_out.weight"],
        ),
        ({"vision.patch_embedding.weight": (9, 4)}, []),
    ],
)
def test_what_has_a_row_for_each_token_is_told_from_headers(shapes, expected):
    assert sorted(token_tensors(Headers(shapes, None))) == sorted(expected)
    assert token_rows(Headers(shapes, {"vocab_size": 7})) == (shapes[expected[0]][0] if expected else 0)
