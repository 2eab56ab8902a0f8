"""Backbone plus expert equals its definition, bit for bit, in a complete checkpoint."""

import json

import numpy as np
import pytest

from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.manifest import MergeInput, backbone_fingerprint, write_manifest
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.errors import CheckpointError, InputError, OutputError
from freemerge.experts import apply as apply_module
from freemerge.experts.apply import apply_expert, list_experts
from freemerge.experts.sidecar import SidecarWriter
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows_reference
from freemerge.kernels.array import BFLOAT16, FLOATS
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.parts import Rows
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint

SCALES = {"model.embed_tokens.weight": 3.5, "model.layers.1.mlp.down_proj.weight": -0.1, "model.norm.weight": 1.0}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(apply_module, "_TILE", 1000)


def write_merged(folder, source, expert_source, mode, shard_size=10**9):
    """A merged model with one expert as a merge would write it."""
    with open_checkpoint(source) as backbone, open_checkpoint(expert_source) as tuned:
        folder.mkdir()
        shards = plan_shards([Entry(n, i.dtype, i.shape) for n, i in backbone.tensors.items()], shard_size)
        with CheckpointWriter(folder, shards, fsync=False) as out:
            for name in backbone.tensors:
                out.write(name, 0, backbone.read(name))
            out.finish()
        checksums = {name: checksum(backbone.read(name)) for name in backbone.tensors}
        rows = {n: sparse_rows(backbone.read(n), tuned.read(n), last=backbone.read(n).size // 10) for n in SCALES}
        starts = {n: random_array((r.count,), tuned.tensors[n].dtype, 5) for n, r in rows.items() if mode == "replace"}
        parts = {n: Rows(r.offsets, r.columns, r.values, r.shape, starts.get(n)) for n, r in rows.items()}
        layouts = {name: part.layout for name, part in parts.items()}
        sidecar = SidecarWriter(folder / "experts" / "math.safetensors", layouts, fsync=False)
        for name, part in parts.items():
            sidecar.write(name, part)
        facts = {"expert": "math", "method": "free", "mode": mode, "backbone": backbone_fingerprint(checksums)}
        sidecar.finish(facts, SCALES)
        inputs = [MergeInput.of(backbone, "base"), MergeInput.of(tuned, "expert")]
        copy_side_files(backbone, folder)
        write_card(folder, method="free", recipe="merge_method: free\n", inputs=inputs, experts=["math"])
        recipe = {"merge_method": "free"}
        write_manifest(folder, recipe=recipe, inputs=inputs, shards=shards, checksums=checksums, experts={"math": {}})
    return rows, starts


@pytest.fixture
def merged(tmp_path):
    def make(dtype=BFLOAT16, mode="add", **kwargs):
        for name, seed in (("base", 0), ("tuned", 1)):
            write_checkpoint(tmp_path / name, tiny_llama(seed, dtype=dtype), config=tiny_llama_config())
        return tmp_path / "merged", *write_merged(
            tmp_path / "merged", tmp_path / "base", tmp_path / "tuned", mode, **kwargs
        )

    return make


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_is_its_definition(merged, tmp_path, small_tiles, dtype, mode):
    folder, rows, starts = merged(dtype, mode)
    apply_expert(folder, "math", tmp_path / "out", fsync=False, threads=3)
    with open_checkpoint(folder) as backbone, open_checkpoint(tmp_path / "out") as out:
        assert out.tensors.keys() == backbone.tensors.keys()
        for name in backbone.tensors:
            expected = np.array(backbone.read(name))
            if name in rows:
                r = rows[name]
                apply_sparse_rows_reference(
                    expected, r.offsets, r.columns, r.values, SCALES[name], starts.get(name), expected, None
                )
            assert out.read(name).tobytes() == expected.tobytes()
        assert (out.read("model.embed_tokens.weight") != backbone.read("model.embed_tokens.weight")).any()
    assert verify(tmp_path / "out").problems == []


def test_every_tile_size_and_sharding_gives_the_same_tensors(merged, tmp_path, monkeypatch):
    folder, *_ = merged()
    found = set()
    for tile, shard_size in [(100, 10**9), (5000, 20_000), (4 << 20, 50_000)]:
        monkeypatch.setattr(apply_module, "_TILE", tile)
        apply_expert(folder, "math", tmp_path / "out", shard_size=shard_size, fsync=False, overwrite=True)
        found.add(json.loads((tmp_path / "out" / "freemerge.json").read_bytes())["backbone"])
    assert len(found) == 1


def test_a_sharded_result_with_its_side_files(merged, tmp_path):
    folder, *_ = merged(shard_size=30_000)
    apply_expert(folder, "math", tmp_path / "out", shard_size=50_000, fsync=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", "freemerge.json", "model.safetensors.index.json"} <= names
    assert "experts" not in names
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_an_expert_of_another_backbone_is_refused(merged, tmp_path):
    folder, *_ = merged()
    manifest = json.loads((folder / "freemerge.json").read_bytes())
    (folder / "freemerge.json").write_text(json.dumps(manifest | {"backbone": "f" * 32}))
    with pytest.raises(CheckpointError, match="belongs to the backbone"):
        apply_expert(folder, "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["maths", "../experts/math", "", "/etc/passwd"])
def test_an_unknown_expert_lists_those_there_are(merged, tmp_path, name):
    folder, *_ = merged()
    with pytest.raises(InputError, match="there are: math"):
        apply_expert(folder, name, tmp_path / "out")


def test_a_damaged_expert_is_named_and_nothing_is_written(merged, tmp_path):
    folder, *_ = merged()
    path = folder / "experts" / "math.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little") + 8
    offset = json.loads(data[8:length])["offsets/model.norm.weight"]["data_offsets"][1] + length
    data[offset - 8 : offset] = (10**6).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"math.safetensors: model.norm.weight: .*write the expert again"):
        apply_expert(folder, "math", tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.freemerge").exists()


def test_an_existing_output_stays(merged, tmp_path):
    folder, *_ = merged()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        apply_expert(folder, "math", tmp_path / "out")


def test_list_experts(merged):
    folder, rows, _ = merged()
    (summary,) = list_experts(folder)
    entries = sum(r.count for r in rows.values())
    elements = sum(int(np.prod(r.shape)) for r in rows.values())
    assert (summary.name, summary.mode, summary.tensors, summary.parameters) == ("math", "add", 3, entries)
    assert summary.kinds == "rows 3"
    assert summary.density == entries / elements
    assert summary.scales == (-0.1, 3.5)
    assert summary.nbytes == summary.file.stat().st_size
    with open_checkpoint(folder) as backbone:
        assert summary.share == summary.nbytes / sum(info.nbytes for info in backbone.tensors.values())
