"""verify finds every change of a result, and nothing else."""

import json
import os
import shutil

import numpy as np
import pytest

from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.manifest import MergeInput, write_manifest
from freemerge.checkpoint.verify import verify
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.errors import CheckpointError
from freemerge.testing import write_safetensors

TENSORS = {name: np.arange(50, dtype=np.float32) + i for i, name in enumerate("abcd")} | {"empty": np.zeros(0, np.int8)}
FACTS = {"model.safetensors": {"size": 1, "mtime_ns": 5, "xxh3_128": "0"}}


def write_result(folder):
    folder.mkdir()
    shards = plan_shards([Entry(n, t.dtype, t.shape) for n, t in TENSORS.items()], 400)
    with CheckpointWriter(folder, shards, fsync=False) as out:
        for name, tensor in TENSORS.items():
            out.write(name, 0, tensor)
        out.finish()
    (folder / "config.json").write_text("{}")
    (folder / "experts").mkdir()
    write_safetensors(folder / "experts" / "math.safetensors", {"x": np.ones(3, np.float32)})
    write_manifest(
        folder,
        recipe={"merge_method": "fr"},
        inputs=[MergeInput(os.fspath(folder), "base", None, FACTS)],
        shards=shards,
        checksums={name: checksum(tensor) for name, tensor in TENSORS.items()},
        experts={"math": {"density": 0.01}},
    )
    return shards


@pytest.fixture
def result(tmp_path):
    write_result(tmp_path / "merged")
    return tmp_path / "merged"


def test_an_untouched_result_has_no_problems(result):
    seen = []
    report = verify(result, on_bytes=seen.append)
    assert (report.ok, report.problems) == (True, [])
    assert (report.tensors, report.files) == (5, 3)
    assert (
        report.nbytes
        == sum(seen)
        == 800
        + sum(
            (result / name).stat().st_size
            for name in ("config.json", "experts/math.safetensors", "model.safetensors.index.json")
        )
    )


def test_manifests_of_equal_results_elsewhere_are_equal(result, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_result(tmp_path / "elsewhere" / "merged")
    assert (result / "freemerge.json").read_bytes() == (
        tmp_path / "elsewhere" / "merged" / "freemerge.json"
    ).read_bytes()


def test_a_manifest_has_one_line_for_each_tensor_file_and_expert(result):
    lines = (result / "freemerge.json").read_text().splitlines()
    for name in ("a", "empty", "config.json", "math"):
        assert sum(line.startswith(f'  "{name}": {{') and line.rstrip(",").endswith("}") for line in lines) == 1


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


FIRST = "model-00001-of-00002.safetensors"
DAMAGE = {
    "tensor": (lambda folder: flip(folder / FIRST, -1), "b: changed"),
    "config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: changed"),
    "config longer": (lambda folder: (folder / "config.json").write_text("{ }"), "config.json: 3 bytes, written as 2"),
    "expert": (lambda folder: flip(folder / "experts/math.safetensors", -1), "experts/math.safetensors: changed"),
    "missing expert": (lambda folder: shutil.rmtree(folder / "experts"), "experts/math.safetensors: missing"),
    "missing shard": (lambda folder: (folder / FIRST).unlink(), f"{FIRST}: cannot be read"),
    "short shard": (lambda folder: os.truncate(folder / FIRST, 300), f"{FIRST}: cut short"),
    "index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "index.json: missing"),
    "extra file": (lambda folder: (folder / "notes.txt").write_text(""), "notes.txt: not part of"),
    "other tensors": (
        lambda folder: write_safetensors(folder / FIRST, {"a": TENSORS["a"].reshape(5, 10), "new": TENSORS["a"]}),
        "b: missing from",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(result, name):
    damage, said = DAMAGE[name]
    damage(result)
    report = verify(result)
    assert not report.ok
    assert any(said in problem for problem in report.problems), report.problems
    # Another tensor than expected is three problems, each named: a reshaped, b missing, one new.
    assert len(report.problems) == (3 if name == "other tensors" else 1)


def test_all_problems_are_listed_at_once(result):
    for name in ("tensor", "config", "extra file", "index"):
        DAMAGE[name][0](result)
    assert len(verify(result).problems) == 4


def test_files_of_tools_are_no_problem(result):
    (result / ".gitattributes").write_text("")
    (result / ".cache").mkdir()
    (result / ".cache" / "x").write_text("")
    assert verify(result).ok


def test_a_forged_manifest_is_found(result):
    manifest = json.loads((result / "freemerge.json").read_bytes())
    manifest["backbone"] = "0" * 32
    (result / "freemerge.json").write_text(json.dumps(manifest))
    assert verify(result).problems == ["freemerge.json: the backbone's fingerprint is not that of its checksums"]


@pytest.mark.parametrize(
    ("text", "said"), [(None, "has no freemerge.json"), ("{", "cannot be read"), ('{"format": 9}', "format 1")]
)
def test_no_manifest_is_an_error(tmp_path, text, said):
    if text is not None:
        (tmp_path / "freemerge.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        verify(tmp_path)
