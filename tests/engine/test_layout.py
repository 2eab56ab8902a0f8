"""Shards are placed as the safetensors library would place them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.layout import Entry, index_json, plan_shard, plan_shards
from freemerge.checkpoint.writer import CheckpointWriter

# What every version of safetensors.numpy can write; the others are read back through torch below.
PLAIN = [dtype for dtype in NAMES if dtype.isbuiltin]

entries_of_plain_dtypes = st.lists(
    st.builds(
        Entry,
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.sampled_from(PLAIN),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    unique_by=lambda entry: entry.name,
    max_size=8,
)


def random_tensors(entries):
    rng = np.random.default_rng(0)
    return {e.name: rng.integers(0, 2, e.shape).astype(e.dtype) for e in entries}


def write_all(folder, shards, tensors):
    with CheckpointWriter(folder, shards, fsync=False) as writer:
        for name, array in tensors.items():
            writer.write(name, 0, array)
        writer.finish()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(entries=entries_of_plain_dtypes)
def test_a_file_equals_that_of_safetensors(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("equal")
    tensors = random_tensors(entries)
    write_all(folder, [plan_shard("ours.safetensors", entries)], tensors)
    save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert (folder / "ours.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(entries=entries_of_plain_dtypes, shard_size=st.integers(1, 300))
def test_every_tensor_is_in_one_shard_of_at_most_the_size(entries, shard_size):
    shards = plan_shards(entries, shard_size)
    assert sorted(e.name for s in shards for e in s.entries) == sorted(e.name for e in entries)
    for shard in shards:
        assert sum(e.nbytes for e in shard.entries) <= shard_size or sum(e.nbytes > 0 for e in shard.entries) == 1
        for entry in shard.entries:
            assert entry.offset % entry.dtype.itemsize == 0


def test_names_and_index_of_several_shards():
    shards = plan_shards([Entry(n, np.dtype(np.float32), (4,)) for n in "abc"], 32)
    assert [s.filename for s in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(index_json(shards))
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"] == {"a": shards[0].filename, "b": shards[0].filename, "c": shards[1].filename}


def test_a_header_with_room_is_readable(tmp_path):
    shard = plan_shard("x.safetensors", [Entry("a", np.dtype(np.int16), (3,))], header_room=1000)
    assert len(shard.header) == 1000
    write_all(tmp_path, [shard], {"a": np.arange(3, dtype=np.int16)})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], [0, 1, 2])


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_every_dtype_is_readable_by_torch(tmp_path, dtype):
    from safetensors.torch import load_file as load_torch

    written = np.arange(6).reshape(2, 3).astype(dtype)
    write_all(tmp_path, plan_shards([Entry("a", dtype, (2, 3))], 10**9), {"a": written})
    np.testing.assert_array_equal(
        load_torch(tmp_path / "model.safetensors")["a"].double().numpy(), written.astype(np.float64)
    )
