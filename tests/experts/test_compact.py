"""Compact experts take the place of those a merge wrote in every way, at the error that is told."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from merged_models import EXPERTS, applied, merged_llama
from typer.testing import CliRunner

import freemerge
from freemerge import cli
from freemerge.checkpoint.header import read_header
from freemerge.checkpoint.manifest import enter_files
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.torch_arrays import from_torch
from freemerge.checkpoint.verify import verify
from freemerge.errors import CheckpointError, InputError, OutputError
from freemerge.experts.apply import apply_expert, list_experts
from freemerge.experts.compact import VALUES, compact_experts
from freemerge.experts.export import export_adapter
from freemerge.experts.sidecar import Expert, read_expert
from freemerge.kernels.array import BFLOAT16
from freemerge.routers import PrototypeRouter, load_router
from freemerge.testing import write_safetensors

pytest.importorskip("transformers")

REPLACE = {"combine": "replace", "relative_to": "base"}
MODES = [{}, REPLACE, {"selection": "model"}]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return merged_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def compact(merged):
    out = merged.parent / "compact"
    compact_experts(merged, out, fsync=False)
    return out


def expert_of(folder, name="math"):
    return read_expert(folder / "experts" / f"{name}.safetensors")


def dense(expert: Expert, tensor: str):
    """What the expert adds to a tensor of zeros."""
    out = np.zeros(expert.tensors[tensor].shape, np.float64)
    expert.tensors[tensor].apply(out, expert.scale(tensor), out=out)
    return out


def entries_of(expert: Expert):
    """What the expert adds at each of its entries, by tensor."""
    return {t: part.expanded().values.astype(np.float64) * expert.scale(t) for t, part in expert.tensors.items()}


def weights(model):
    return {name: from_torch(tensor.cpu()).tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("parameters", MODES, ids=str)
def test_the_error_is_what_is_told(tmp_path, parameters):
    merged = merged_llama(tmp_path, experts=("math", "code"), **parameters)
    # normal numbers, a tenth of them: a step of int8 is 1/127 of the row's largest, of e4m3 1/16 of a value
    for values, at_most in (("int8", 0.01), ("float8", 0.06)):
        told = compact_experts(merged, tmp_path / values, values=values, fsync=False)
        assert [expert.name for expert in told] == ["code", "math"]
        for facts in told:
            plain, small = expert_of(merged, facts.name), expert_of(tmp_path / values, facts.name)
            assert (small.mode, small.tensors.keys()) == (plain.mode, plain.tensors.keys())
            before, after = (entries_of(expert) for expert in (plain, small))
            errors = {tensor: after[tensor] - before[tensor] for tensor in before}
            each = {tensor: np.linalg.norm(errors[tensor]) / np.linalg.norm(before[tensor]) for tensor in before}
            total, norm = (np.linalg.norm(np.concatenate(list(found.values()))) for found in (errors, before))
            assert facts.error == pytest.approx(total / norm, rel=1e-6)
            assert 0 < facts.error < at_most
            assert facts.largest_error == pytest.approx(max(np.abs(e).max() for e in errors.values()), rel=1e-6)
            assert facts.worst_tensor == max(each, key=each.get)
            assert facts.worst_error == pytest.approx(max(each.values()), rel=1e-6)


@pytest.mark.parametrize("values", VALUES)
def test_columns_take_two_bytes_values_one_and_rows_six(merged, tmp_path, values):
    (facts, *_) = compact_experts(merged, tmp_path / "out", values=values, fsync=False)
    path = tmp_path / "out" / "experts" / "code.safetensors"
    header, expert = read_header(path), expert_of(tmp_path / "out", "code")
    rows = sum(len(part.lengths) for part in expert.tensors.values())
    entries = sum(part.count for part in expert.tensors.values())
    assert facts.nbytes == path.stat().st_size == header.length + 3 * entries + 6 * rows
    plain = merged / "experts" / "code.safetensors"
    assert facts.nbytes_before == plain.stat().st_size
    with open_checkpoint(merged) as backbone:
        assert facts.share == facts.nbytes / sum(info.nbytes for info in backbone.tensors.values())


def test_the_rest_of_the_folder(merged, compact):
    assert verify(compact).problems == []
    before, after = (json.loads((folder / "freemerge.json").read_bytes()) for folder in (merged, compact))
    assert before["backbone"] == after["backbone"]
    assert before["tensors"] == after["tensors"]
    changed = {f"experts/{name}.safetensors" for name in EXPERTS}
    assert before["files"].keys() == after["files"].keys() >= changed
    assert {name for name, facts in after["files"].items() if facts != before["files"][name]} == changed
    for name in EXPERTS:
        assert after["experts"][name]["file"] == f"experts/{name}.safetensors"
        assert after["experts"][name]["values"] == "int8"
    assert os.path.samefile(compact / "model.safetensors", merged / "model.safetensors")
    assert not os.path.samefile(compact / "config.json", merged / "config.json")
    assert (compact / "config.json").read_bytes() == (merged / "config.json").read_bytes()


def test_without_hard_links_weights_are_copied(merged, tmp_path, monkeypatch):
    def refuse(source, place):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    compact_experts(merged, tmp_path / "out", fsync=False)
    assert not os.path.samefile(tmp_path / "out" / "model.safetensors", merged / "model.safetensors")
    assert verify(tmp_path / "out").problems == []


def test_equal_merges_have_equal_compact_files(merged, compact, tmp_path):
    compact_experts(merged, tmp_path / "again", fsync=False)
    for path in compact.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(compact)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("values", "parameters"), [("float8", {}), *(("int8", mode) for mode in MODES)], ids=str)
def test_applied_attached_and_routed_alike(tmp_path, values, parameters):
    merged = merged_llama(tmp_path, experts=("math", "code"), **parameters)
    out = tmp_path / "out"
    compact_experts(merged, out, values=values, fsync=False)
    model = freemerge.load(out, verify=True)
    backbone = weights(model)
    for name in ("math", "code"):
        model.use_expert(name)
        assert weights(model) == applied(out, name, tmp_path / "applied" / name)
        assert weights(model) != applied(merged, name, tmp_path / "plain" / name)
    model.use_expert(None)
    assert weights(model) == backbone
    model.float()
    batch, expected = torch.arange(18).reshape(3, 6), []
    with torch.no_grad():
        for row, name in enumerate(("code", None, "math")):
            model.use_expert(name)
            expected.append(model(batch[row : row + 1]).logits)
        model.use_expert(None)
        with model.routed(["code", None, "math"]):
            found = model(batch).logits
        assert not torch.allclose(found, model(batch).logits, atol=1e-2)
    # two orders of summation in float32, over layers with activations of size 1 to 10
    torch.testing.assert_close(found, torch.cat(expected), rtol=2e-4, atol=2e-4)


def test_what_replaces_does_so_with_the_same_entries(tmp_path):
    merged = merged_llama(tmp_path, dtype=np.float32, experts=("math",), **REPLACE)
    (facts,) = compact_experts(merged, tmp_path / "out", values="float8", fsync=False)
    plain, small = (tmp_path / "plain", tmp_path / "small")
    for folder, place in ((merged, plain), (tmp_path / "out", small)):
        apply_expert(folder, "math", place, fsync=False)
    with open_checkpoint(plain) as one, open_checkpoint(small) as other:
        for name in one.tensors:
            # the sum is rounded to float32, of weights around one
            assert np.abs(one.read(name) - other.read(name)).max() <= facts.largest_error + 2.0**-22


def test_several_are_added_and_exported(merged, compact, tmp_path):
    apply_expert(compact, {"math": 0.5, "code": 0.25}, tmp_path / "both", fsync=False)
    with open_checkpoint(compact) as backbone, open_checkpoint(tmp_path / "both") as both:
        name = "model.layers.0.mlp.up_proj.weight"
        added = 0.5 * dense(expert_of(compact), name) + 0.25 * dense(expert_of(compact, "code"), name)
        expected = backbone.read(name).astype(np.float64) + added
        # one rounding to bfloat16 of numbers up to a half
        np.testing.assert_allclose(both.read(name).astype(np.float64), expected, rtol=2.0**-8, atol=1e-6)
    rows, exact = (
        {row.tensor: row for row in export_adapter(folder, "math", tmp_path / place, rank=4, fsync=False)}
        for folder, place in ((compact, "lora"), (merged, "exact"))
    )
    assert rows.keys() == exact.keys()
    assert rows[name].change == pytest.approx(exact[name].change, rel=1e-3)
    assert rows[name].error == pytest.approx(exact[name].error, rel=1e-2)


def test_a_router_comes_along(tmp_path):
    merged = merged_llama(tmp_path, experts=("math", "code"))
    features = {name: np.random.default_rng(seed).standard_normal((9, 5)) for seed, name in enumerate(("math", "code"))}
    PrototypeRouter.fit(features).save(merged)
    compact_experts(merged, tmp_path / "out", fsync=False)
    assert load_router(tmp_path / "out").experts == load_router(merged).experts


def test_they_are_listed(merged, compact):
    for plain, small in zip(list_experts(merged), list_experts(compact), strict=True):
        assert (plain.values, plain.error) == ("float32", None)
        assert small.values == "int8"
        assert small.kinds == plain.kinds.replace("rows", "quantized_rows")
        assert (small.parameters, small.density, small.scales) == (plain.parameters, plain.density, plain.scales)
        assert 0.4 < small.nbytes / plain.nbytes < 0.8
        assert float(small.error) == float(expert_of(compact, small.name).metadata["quantization_error"])


def test_what_has_no_sparse_rows_stays_as_it_is(merged, compact, tmp_path):
    with pytest.raises(InputError, match=r"no expert of .* has sparse rows of float32"):
        compact_experts(compact, tmp_path / "out")
    sources = {name: merged.parent / name for name in EXPERTS}
    freemerge.merge("emr", base=merged.parent / "base", experts=sources, out=tmp_path / "emr", fsync=False)
    with pytest.raises(InputError, match=r"no expert of .* has sparse rows of float32"):
        compact_experts(tmp_path / "emr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_other_kinds_in_an_expert_are_copied(merged, tmp_path):
    sources = {name: merged.parent / name for name in ("math", "code")}
    given = {"density": 0.2, "compression": "magnitude", "fsync": False}
    freemerge.merge("twin", base=merged.parent / "base", experts=sources, out=tmp_path / "twin", **given)
    compact_experts(tmp_path / "twin", tmp_path / "out", fsync=False)
    plain, small = expert_of(tmp_path / "twin"), expert_of(tmp_path / "out")
    assert {part.kind for part in plain.tensors.values()} == {"rows", "difference"}
    for name, part in plain.tensors.items():
        assert small.tensors[name].kind == {"rows": "quantized_rows", "difference": "difference"}[part.kind]
        if part.kind == "difference":
            np.testing.assert_array_equal(part.difference, small.tensors[name].difference)


def test_in_place(tmp_path):
    merged = merged_llama(tmp_path, experts=("math", "code"))
    plain = applied(merged, "math", tmp_path / "plain")
    with pytest.raises(OutputError, match="--overwrite"):
        compact_experts(merged, merged, fsync=False)
    compact_experts(merged, merged, overwrite=True, fsync=False)
    assert verify(merged).problems == []
    assert [expert.values for expert in list_experts(merged)] == ["int8", "int8"]
    assert applied(merged, "math", tmp_path / "small").keys() == plain.keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [({"values": "int4"}, "values are int8 or float8, not 'int4'"), ({"out": "merged/compact"}, "lies in")],
    ids=str,
)
def test_what_makes_no_sense_is_refused(merged, given, said):
    out = merged.parent / given.pop("out", "out")
    with pytest.raises(InputError, match=said):
        compact_experts(merged, out, **given)
    assert not out.exists()


def rewrite(path, change):
    """The file with `change(tensors, metadata)` done to it."""
    header = read_header(path)
    data = path.read_bytes()
    tensors = {
        name: np.frombuffer(data, info.dtype, info.numel, info.offset).reshape(info.shape).copy()
        for name, info in header.tensors.items()
    }
    metadata = dict(header.metadata)
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


def put(name, index, number):
    def change(tensors, metadata):
        tensors[name][index] = number

    return change


def cast(name, dtype):
    def change(tensors, metadata):
        tensors[name] = tensors[name].astype(dtype)

    return change


def scaled(name, scale):
    def change(tensors, metadata):
        facts = json.loads(metadata["tensors"])
        facts[name]["scale"] = scale
        metadata["tensors"] = json.dumps(facts)

    return change


NORM = "model.norm.weight"
DAMAGES = [
    (put(f"row_scales/{NORM}", 0, -1), rf"{NORM}: the scale of row 0 is -1.0, not a finite number of 0 or more"),
    (put(f"row_scales/{NORM}", 0, np.nan), rf"{NORM}: the scale of row 0 is nan"),
    (put(f"lengths/{NORM}", 0, 40_000), rf"{NORM}: lengths lead to 40000 entries"),
    (put(f"columns/{NORM}", 0, 999), rf"{NORM}: column 999 in rows 48 long"),
    (scaled(NORM, np.nan), rf"{NORM} has the scale nan"),
    (cast(f"values/{NORM}", np.float16), rf"values/{NORM} is float16 \[4\], not int8 \[4\]"),
    (cast(f"values/{NORM}", np.uint8), rf"values/{NORM} is uint8"),
    (cast(f"row_scales/{NORM}", BFLOAT16), rf"row_scales/{NORM} is bfloat16"),
    (lambda tensors, _: tensors.pop(f"lengths/{NORM}"), rf"lengths/{NORM} is missing"),
    (lambda tensors, _: tensors.pop(f"values/{NORM}"), rf"{NORM} is of the kind quantized_rows, but its arrays"),
    (lambda _, metadata: metadata.update(quantization_error="much"), "quantization_error is 'much', not a number"),
    (lambda _, metadata: metadata.update(mode="replace"), rf"start/{NORM} is missing"),
    (lambda _, metadata: metadata.update(version="4"), "format version 4; this freemerge reads versions 1, 2, 3"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_a_damaged_file_is_refused_before_anything_changes(merged, compact, tmp_path, change, said):
    folder, file = tmp_path / "damaged", "experts/math.safetensors"
    shutil.copytree(compact, folder)
    rewrite(folder / file, change)
    model = freemerge.load(merged)
    model.detach_experts()
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"math\.safetensors: not what was written|bytes, written as"):
        freemerge.attach(model, folder)
    enter_files(folder, [file], fsync=False)
    for use in (
        lambda: freemerge.attach(model, folder),
        lambda: apply_expert(folder, "math", tmp_path / "out"),
        lambda: export_adapter(folder, "math", tmp_path / "out", rank=2),
    ):
        with pytest.raises(CheckpointError, match=said):
            use()
    assert weights(model) == before
    assert not hasattr(model, "use_expert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["truncated", "tampered", "not finite"])
def test_damaged_experts_are_not_made_compact(tmp_path, how):
    merged = merged_llama(tmp_path, experts=("math", "code"))
    path = merged / "experts" / "math.safetensors"
    if how == "not finite":
        rewrite(path, put(f"values/{NORM}", 0, np.nan))
        enter_files(merged, ["experts/math.safetensors"], fsync=False)
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 64
        path.write_bytes(data[:-8] if how == "truncated" else data)
    said = {
        "truncated": "bytes, written as",
        "tampered": "not what was written",
        "not finite": f"{NORM}: .* not finite",
    }
    with pytest.raises(CheckpointError, match=rf"math\.safetensors: .*{said[how]}"):
        compact_experts(merged, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.freemerge").exists()


def test_the_command(merged, tmp_path):
    run = CliRunner().invoke
    out = str(tmp_path / "out")
    answer = run(cli.app, ["experts", "compact", str(merged), out, "--values", "float8", "--no-fsync"])
    assert answer.exit_code == 0
    for said in (*EXPERTS, "worst_tensor", "error", "with experts of"):
        assert said in answer.stdout
    answer = run(cli.app, ["experts", "list", out])
    assert "float8_e4m3fn" in answer.stdout
    assert "of the dense model" in answer.stdout
    listed = json.loads(run(cli.app, ["experts", "list", out, "--json"]).stdout)
    assert all(0 < expert["error"] < 0.06 for expert in listed)
    answer = run(cli.app, ["experts", "compact", str(merged), out, "--overwrite", "--json", "--no-fsync"])
    assert [expert["name"] for expert in json.loads(answer.stdout)] == sorted(EXPERTS)
    assert run(cli.app, ["experts", "compact", str(merged), out]).exit_code == 1
