"""An expert's file holds what was written, and says what is wrong with it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from freemerge.errors import CheckpointError, OutputError
from freemerge.experts.sidecar import ExpertFolder, SidecarWriter, read_expert
from freemerge.kernels.array import BFLOAT16, FLOAT8_E4M3FN, column_dtype, rows_of
from freemerge.parts import Difference, LowRank, Mask, QuantizedRows, Rows
from freemerge.testing import write_safetensors

METADATA = {"expert": "math", "method": "free", "mode": "add", "backbone": "0" * 32}


def random_rows(shape, seed, density=0.3, start=None):
    rng = np.random.default_rng(seed)
    height, width = rows_of(shape)
    chosen = rng.random((height, width)) < density
    offsets = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int64)
    columns = np.nonzero(chosen)[1].astype(column_dtype(width))
    values = rng.standard_normal(len(columns)).astype(np.float32)
    return Rows(offsets, columns, values, shape, None if start is None else np.arange(len(columns)).astype(start))


def write_expert(path, tensors, scales=1.0, **metadata):
    out = SidecarWriter(path, {name: part.layout for name, part in tensors.items()}, fsync=False)
    for name, part in tensors.items():
        out.write(name, part)
    out.finish(METADATA | metadata, scales)


def assert_same_part(found, expected):
    assert found.layout == expected.layout
    for role, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[role], array)


names = st.text(min_size=1, max_size=10).filter(str.isprintable)
shapes = st.one_of(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.just((2, 65537)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    described=st.dictionaries(names, st.tuples(shapes, st.integers(0, 99), st.floats(-1e300, 1e300)), max_size=5),
    start_dtype=st.sampled_from([None, BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]),
)
def test_round_trip(tmp_path_factory, described, start_dtype):
    path = tmp_path_factory.mktemp("expert") / "math.safetensors"
    tensors = {name: random_rows(shape, seed, start=start_dtype) for name, (shape, seed, _) in described.items()}
    scales = {name: scale for name, (_, _, scale) in described.items()}
    write_expert(path, tensors, scales, mode="replace" if start_dtype else "add", mu=6.5)
    expert = read_expert(path)
    assert (expert.name, expert.metadata["mu"]) == ("math", "6.5")
    assert expert.tensors.keys() == tensors.keys()
    for name, rows in tensors.items():
        assert_same_part(expert.tensors[name], rows)
        assert not expert.tensors[name].values.flags.writeable
        assert expert.scale(name) == scales[name]


def parts_of_every_kind(shape=(5, 7)):
    rng = np.random.default_rng(0)
    numbers = lambda *sides: rng.standard_normal(sides, np.float32)  # noqa: E731
    vector = numbers(*shape)
    mask = np.packbits(rng.random(shape) < 0.5, bitorder="little")
    return {
        "rows": random_rows(shape, 0),
        "int8": QuantizedRows.quantized(random_rows(shape, 1), np.dtype(np.int8)),
        "float8": QuantizedRows.quantized(random_rows(shape, 2, start=np.float32), FLOAT8_E4M3FN),
        "mask": Mask(mask, vector, shape),
        "low rank": LowRank(numbers(shape[0], 2), numbers(2, shape[1]), shape),
        "difference": Difference(numbers(*shape), shape),
    }


def test_parts_of_every_kind_and_what_is_shared(tmp_path):
    parts = parts_of_every_kind()
    folder = ExpertFolder(tmp_path, fsync=False)
    shared = folder.open_shared("emr", {"mask": {"vector": (np.dtype(np.float32), (5, 7))}})
    shared.write("mask", {"vector": parts["mask"].vector})
    shared.finish({"method": "emr", "fingerprint": "f" * 32})
    out = folder.open("math", {name: part.layout for name, part in parts.items()})
    for name, part in parts.items():
        assert out.write(name, part) == out.checksum(name)
    out.finish(METADATA | {"method": "emr", "shared": "f" * 32}, 0.5)
    expert = read_expert(tmp_path / "math.safetensors")
    for name, part in parts.items():
        assert_same_part(expert.tensors[name], part)
        assert expert.tensors[name].kind == part.kind
    np.testing.assert_array_equal(expert.tensors["mask"].vector, parts["mask"].vector)


@pytest.mark.parametrize(
    ("fingerprint", "shape", "said"),
    [("0" * 32, (5, 7), "of another merge"), ("f" * 32, (7, 5), "vector/mask is missing or of another shape")],
)
def test_what_is_shared_has_to_be_of_this_merge(tmp_path, fingerprint, shape, said):
    mask = parts_of_every_kind()["mask"]
    folder = ExpertFolder(tmp_path, fsync=False)
    shared = folder.open_shared("emr", {"mask": {"vector": (np.dtype(np.float32), shape)}})
    shared.finish({"method": "emr", "fingerprint": fingerprint})
    out = folder.open("math", {"mask": mask.layout})
    out.finish(METADATA | {"method": "emr", "shared": "f" * 32}, 1.0)
    with pytest.raises(CheckpointError, match=said):
        read_expert(tmp_path / "math.safetensors")
    (tmp_path / "shared" / "emr.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shared/emr.safetensors"):
        read_expert(tmp_path / "math.safetensors")


def test_safetensors_reads_it(tmp_path):
    rows = random_rows((7, 11), 0)
    write_expert(tmp_path / "math.safetensors", {"a": rows}, scales=2.0)
    with safe_open(tmp_path / "math.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("values/a"), rows.values)
        assert json.loads(file.metadata()["tensors"]) == {"a": {"kind": "rows", "shape": [7, 11], "scale": 2.0}}


def test_checksum_is_that_of_what_was_written(tmp_path):
    rows = random_rows((5, 6), 0)
    first = SidecarWriter(tmp_path / "math.safetensors", {"a": rows.layout}, fsync=False)
    written = first.write("a", rows)
    assert first.checksum("a") == written
    first.close()
    again = SidecarWriter(tmp_path / "math.safetensors", {"a": rows.layout}, fsync=False)
    assert again.checksum("a") == written
    other = Rows(rows.offsets, rows.columns, -rows.values, rows.shape)
    assert again.write("a", other) != written
    again.close()


def test_equal_experts_are_equal_files(tmp_path):
    tensors = {name: random_rows((3, 4), seed) for seed, name in enumerate("ab")}
    write_expert(tmp_path / "x.safetensors", tensors, mu=1, density=0.1)
    write_expert(tmp_path / "y.safetensors", dict(reversed(tensors.items())), density=0.1, mu=1)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_what_was_not_announced_is_refused(tmp_path):
    rows = random_rows((5, 6), 0)
    out = SidecarWriter(tmp_path / "x.safetensors", {"a": rows.layout}, fsync=False)
    for other in (
        random_rows((5, 6), 1),
        random_rows((5, 6), 0, start=np.float32),
        parts_of_every_kind((5, 6))["mask"],
    ):
        with pytest.raises(ValueError, match="announced"):
            out.write("a", other)
    with pytest.raises(ValueError, match="backbone"):
        out.finish({"expert": "x", "method": "free", "mode": "add"}, 1.0)
    with pytest.raises(OutputError, match="longer than the room"):
        out.finish(METADATA | {"note": "x" * 20_000}, 1.0)
    out.close()


def test_an_unfinished_expert_is_none(tmp_path):
    out = SidecarWriter(tmp_path / "x.safetensors", {"a": Rows.planned((5, 6), 3)}, fsync=False)
    out.close()
    with pytest.raises(CheckpointError, match="never finished"):
        read_expert(tmp_path / "x.safetensors")


def damaged(**changes):
    rows = random_rows((5, 6), 0)
    tensors = {"offsets/a": rows.offsets, "columns/a": rows.columns, "values/a": rows.values}
    metadata = {"format": "freemerge-expert", "version": "1", **METADATA}
    metadata["tensors"] = '{"a":{"shape":[5,6],"scale":1.0}}'
    for key, value in changes.items():
        group = metadata if isinstance(value, str) or key in metadata else tensors
        name = key if group is metadata else f"{key}/a"
        if value is None:
            del group[name]
        else:
            group[name] = value
    return tensors, metadata


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "not an expert"),
        ({"version": "4"}, "format version 4; this freemerge reads versions 1, 2, 3"),
        ({"backbone": None}, "lack backbone"),
        ({"mode": "xor"}, "'xor', not add or replace"),
        ({"mode": "replace"}, "start/a is missing"),
        ({"tensors": "{"}, "do not describe"),
        ({"tensors": "[]"}, "do not describe"),
        ({"tensors": '{"a":{"shape":"x","scale":1}}'}, "do not describe"),
        ({"tensors": '{"b":{"shape":[5,6],"scale":1}}'}, "b is of the kind rows, but its arrays .* are missing"),
        ({"tensors": '{"a":{"kind":"mask","shape":[5,6],"scale":1}}'}, "a is of the kind mask, but its arrays mask"),
        ({"tensors": '{"a":{"kind":"low_rank","shape":[5,6],"scale":1}}'}, "left, right are missing"),
        (
            {"tensors": '{"a":{"kind":"wavelet","shape":[5,6],"scale":1}}'},
            "'wavelet'; this freemerge reads rows, quantized_rows, mask",
        ),
        ({"tensors": '{"a":{"shape":[4,6],"scale":1}}'}, "offsets/a is int64"),
        ({"columns": None}, "columns/a is missing"),
        ({"columns": np.zeros(3, np.uint16)}, "columns/a is uint16"),
        ({"offsets": np.zeros(6, np.int32)}, "offsets/a is int32"),
    ],
    ids=str,
)
def test_damage_is_named(tmp_path, changes, said):
    tensors, metadata = damaged(**changes)
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=said):
        read_expert(tmp_path / "x.safetensors")


def test_an_undamaged_expert_of_version_1_is_read(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", *damaged())
    expert = read_expert(tmp_path / "x.safetensors")
    assert list(expert.tensors) == ["a"]
    assert_same_part(expert.tensors["a"], random_rows((5, 6), 0))
