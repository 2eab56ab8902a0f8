"""Thousands of mutated files against the format's own reader: refused where it refuses, else the same bytes."""

import copy
import json
import random
import struct
from contextlib import suppress

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoint.dtypes import NAMES, UNREAD
from freemerge.checkpoint.header import read_header
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError
from freemerge.testing import write_checkpoint

CASES = 6000
NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    8,
    12,
    24,
    -1,
    True,
    1.5,
    2.0,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
]
ODD = [None, "", "F32", [], {}, [0], [[0, 4]], {"dtype": "F32"}, "\ud800", "\0", float("inf")]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"true",
    b"0",
    b"-0",
    b"1e3",
    b"\0",
    b"\xff",
]
TOKENS += [b" ", b"\n", b'"__metadata__"', b'"dtype"', b"99999999999999999999", b"/**/", b"NaN"]


def sample(rng):
    """Entries of a correct file, and how many bytes of data it has."""
    entries, position = {}, 0
    if rng.random() < 0.5:
        entries["__metadata__"] = {"format": "pt", "": "\u00e9"}
    for i in range(rng.randrange(5)):
        dtype, name = rng.choice([(dtype, name) for dtype, name in NAMES.items()])
        shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randrange(4))]
        size = dtype.itemsize
        for n in shape:
            size *= n
        entries[f"layer.{i}.\u00e9"] = {"dtype": name, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return entries, position


def places_in(value):
    """Every (holder, key) there is in nested dicts and lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places_in(value[key])]]


def mutate_entries(rng, entries):
    places = places_in(entries)
    if not places:
        return
    holder, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        holder[key] = rng.choice(NUMBERS)
    elif kind == 1:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif kind == 3:
        holder[key] = rng.choice([*NAMES.values(), *UNREAD])
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "a\0", "__metadata__", "dtype", "extra"])] = holder.pop(key)
    elif kind == 5:
        other, other_key = rng.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif isinstance(holder, dict):
        del holder[key]


def mutate_bytes(rng, text):
    text = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            text[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            text[at:at] = rng.choice(TOKENS)
        elif kind == 2:
            del text[at : at + rng.choice([1, 2, 10])]
        elif kind == 3:
            text[at:at] = text[at : at + rng.randrange(40)]
        else:
            text[at : at + 1] = bytes([text[at % len(text)] ^ (1 << rng.randrange(8))]) if text else b""
    return bytes(text)


def mutated(rng):
    entries, size = sample(rng)
    kind = rng.randrange(8)
    for _ in range(rng.choice([1, 1, 2]) if kind < 4 else 0):
        mutate_entries(rng, entries)
    text = json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind in (3, 4, 5):
        text = mutate_bytes(rng, text)
    data = rng.randbytes(max(size + (rng.choice([-1, 1, 8]) if kind == 6 else 0), 0))
    length = len(text)
    if kind == 7:
        length = rng.choice([length - 1, length + 1, length + len(data), 0, 2**63, 2**64 - 1, 100_000_001])
    return struct.pack("<Q", max(length, 0)) + text + data


def expected(raw):
    """Name to (dtype, shape, bytes) by the safetensors package, None where it refuses."""
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def answer(path, raw):
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError:
        return None
    if not header.tensors:
        return {}
    with open_checkpoint(path) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint.tensors}
        return {name: (NAMES[array.dtype], array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("seed", range(4))
def test_mutated_headers_are_refused_or_read_right(tmp_path, seed):
    rng = random.Random(seed)
    accepted = 0
    for case in range(CASES // 4):
        raw = mutated(rng)
        ours = answer(tmp_path / "model.safetensors", raw)
        if ours is not None:
            assert ours == expected(raw), (case, raw)
            accepted += 1
    # The mutations are mild enough that both ways are taken: else this would test nothing.
    assert CASES // 4 // 50 < accepted < CASES // 4 // 2


def test_unmutated_files_are_all_accepted(tmp_path):
    rng = random.Random(9)
    for _ in range(300):
        entries, size = sample(rng)
        text = json.dumps(entries).encode()
        raw = struct.pack("<Q", len(text)) + text + rng.randbytes(size)
        assert answer(tmp_path / "model.safetensors", raw) == expected(raw) is not None


def test_mutated_indexes_are_refused_or_read_right(tmp_path):
    rng = random.Random(0)
    tensors = {"a": np.float32([1]), "b": np.float32([2]), "c": np.float32([3])}
    index = write_checkpoint(tmp_path, tensors, shards=3) / "model.safetensors.index.json"
    text = index.read_bytes()
    accepted = 0
    for _ in range(500):
        index.write_bytes(mutate_bytes(rng, text))
        with suppress(CheckpointError), open_checkpoint(index) as checkpoint:
            assert {name: checkpoint.read(name) for name in checkpoint.tensors} == tensors
            accepted += 1
    assert accepted > 10


SIZES = st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**64, 2.0, True, None])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*NAMES.values(), *UNREAD, "x"]),
        "shape": st.lists(SIZES, max_size=4) | SIZES,
        "data_offsets": st.lists(SIZES, max_size=3) | SIZES,
    }
)


@given(st.binary(max_size=40) | st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), st.binary(max_size=12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_and_any_entries(tmp_path_factory, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + data
    ours = answer(tmp_path_factory.getbasetemp() / "any.safetensors", raw)
    assert ours is None or ours == expected(raw)
