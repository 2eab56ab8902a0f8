"""A test for each way the head of a file can lie."""

import json
import os

import numpy as np
import pytest

from freemerge.checkpoint.dtypes import UNREAD
from freemerge.checkpoint.header import MAX_LENGTH, read_header
from freemerge.errors import CheckpointError
from freemerge.testing import write_safetensors

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture
def refused(tmp_path):
    """Calls read_header on a file of this header (text or entries), and returns the message."""

    def run(header, data=24, length=None, raw=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        size = len(text) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + text + bytes(data) if raw is None else raw)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert f"{path}: " in str(caught.value)
        assert "Download or write the file again." in str(caught.value)
        return str(caught.value)

    return run


def test_reads_tensors_metadata_and_where_the_data_starts(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"b": np.zeros((2, 3), np.float32), "a": np.zeros((), np.uint8)}, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["b", "a"]
    assert header.tensors["b"].offset == header.length
    assert header.tensors["a"].offset == header.length + 24
    assert (header.tensors["b"].numel, header.tensors["b"].nbytes) == (6, 24)
    assert header.length + 25 == path.stat().st_size


def test_tensors_may_come_in_any_order_and_be_empty(tmp_path):
    path = tmp_path / "model.safetensors"
    entries = {
        "last": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]},
        "empty": {"dtype": "F64", "shape": [0, 10**9], "data_offsets": [3, 3]},
        "first": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    text = json.dumps(entries).encode() + b"   \n\t "
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(7)))
    assert [info.offset - 8 - len(text) for info in read_header(path).tensors.values()] == [3, 3, 0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, too short for a safetensors file"),
        (b"\1" * 7, "7 bytes, too short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "not a safetensors file: its header would be"),
        ((MAX_LENGTH + 1).to_bytes(8, "little") + b"{}", f"{MAX_LENGTH} are allowed"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "are allowed"),
        ((3).to_bytes(8, "little") + b"{}", "cut short: 10 bytes, the header alone is 11"),
        (bytes(8), "does not start with '{'"),
        ((3).to_bytes(8, "little") + b" {}", "does not start with '{'"),
        ((5).to_bytes(8, "little") + b"\xef\xbb\xbf{}", "does not start with '{'"),
    ],
)
def test_refuses_what_is_no_safetensors_file(refused, raw, message):
    assert message in refused({}, raw=raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "header is not JSON"),
        (b"{}x", "header is not JSON: Extra data"),
        (b"{}\0", "header is not JSON"),
        (b'{"a": 1,}', "header is not JSON"),
        (b'{"a\n": 1}', "header is not JSON: Invalid control character"),
        (b'{"\xff": 1}', "header is not UTF-8 at byte 2"),
        (b'{"a": 1, "a": 1}', "header names a twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "header names __metadata__ twice"),
        (b'{"__metadata__": {"x": "1", "x": "2"}}', "header names x twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F64"}}', "header names dtype twice"),
        (b'{"a": ' * 5000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000_000 + b"}", "where only sizes and offsets may be"),
        (b'{"a": NaN}', "NaN where only sizes"),
        (b'{"a": -Infinity}', "-Infinity where only sizes"),
    ],
)
def test_refuses_what_is_no_plain_json(refused, text, message):
    assert message in refused(text)


@pytest.mark.parametrize(
    "metadata", [None, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": "\ud800"}, {"\udc00": "a"}]
)
def test_refuses_metadata_that_is_not_strings(refused, metadata):
    assert "__metadata__ " in refused({"__metadata__": metadata, "a": GOOD})


@pytest.mark.parametrize(
    ("name", "message"), [("", "'': a tensor without a name"), ("a\0b", "NUL"), ("\ud800", "half a character")]
)
def test_refuses_names_nobody_can_use(refused, name, message):
    assert message in refused({name: GOOD})


@pytest.mark.parametrize(
    "entry",
    [None, [], "F32", 7, {}, {**GOOD, "strides": [1]}, {"dtype": "F32", "shape": [2, 3]}, ["F32", [2, 3], [0, 24]]],
)
def test_refuses_entries_of_another_form(refused, entry):
    assert "a: its entry is not {dtype, shape, data_offsets}" in refused({"a": entry})


@pytest.mark.parametrize("dtype", UNREAD)
def test_names_the_dtype_it_does_not_read(refused, dtype):
    assert f"a: stored as {dtype}, which freemerge does not read" in refused({"a": {**GOOD, "dtype": dtype}})


@pytest.mark.parametrize("dtype", ["f32", "F31", "", None, 32, ["F32"], {"F32": 1}, "x" * 10**6, "\x1b[31m"])
def test_refuses_dtypes_that_do_not_exist(refused, dtype):
    message = refused({"a": {**GOOD, "dtype": dtype}})
    assert "a: no dtype is called " in message
    assert len(message) < 800
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("[2, -3]", "-3 where only sizes"),
        ("[2, 3.0]", "3.0 where only sizes"),
        ("[2, 3e0]", "3e0 where only sizes"),
        ("[-0]", "-0 where only sizes"),
        ("[true, 24]", "its shape is not a list of sizes"),
        ('["2", 3]', "its shape is not a list of sizes"),
        ("[2, null]", "its shape is not a list of sizes"),
        ("6", "its shape is not a list of sizes"),
        ("{}", "its shape is not a list of sizes"),
        ("[[2, 3]]", "its shape is not a list of sizes"),
        ("[2, 4]", "F32 [2, 4] takes 32 bytes, its offsets [0, 24] hold 24"),
        ("[]", "F32 [] takes 4 bytes"),
        ("[0]", "F32 [0] takes 0 bytes"),
        ("[4294967296, 4294967296]", "larger than any memory"),
        ("[9223372036854775807, 4, 0]", "larger than any memory"),
        ("[18446744073709551618, 3]", "where only sizes"),
        ("[" + "1, " * 32 + "6]", "33 dimensions, 32 are allowed"),
    ],
)
def test_refuses_shapes_that_are_not_the_bytes(refused, shape, message):
    assert message in refused(f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 24]}}}}'.encode())


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([24, 0], "run backwards"),
        ([0], "are not [begin, end]"),
        ([0, 24, 24], "are not [begin, end]"),
        ([False, 24], "are not [begin, end]"),
        (["0", 24], "are not [begin, end]"),
        (24, "are not [begin, end]"),
        ([0, 2**63], "takes 24 bytes"),
        ([8, 32], "a: 8 bytes before it belong to no tensor"),
        ([1, 25], "a: 1 bytes before it"),
    ],
)
def test_refuses_offsets_that_are_not_the_bytes(refused, offsets, message):
    assert message in refused({"a": {**GOOD, "data_offsets": offsets}})


def test_refuses_overlaps_and_holes_between_tensors(refused):
    overlap = {"a": GOOD, "b": {**GOOD, "data_offsets": [20, 44]}}
    assert "b: starts 4 bytes inside the tensor before it" in refused(overlap, data=44)
    assert "b: starts 24 bytes inside the tensor before it" in refused({"a": GOOD, "b": GOOD})
    assert "b: 6 bytes before it belong to no tensor" in refused(
        {"a": GOOD, "b": {**GOOD, "data_offsets": [30, 54]}}, data=54
    )
    inside = {"a": GOOD, "b": {"dtype": "U8", "shape": [0], "data_offsets": [12, 12]}}
    assert "b: starts 12 bytes inside" in refused(inside)


def test_refuses_bytes_too_few_or_too_many(refused):
    assert "cut short: 1 bytes of tensors are missing" in refused({"a": GOOD}, data=23)
    assert "1 bytes at its end belong to no tensor" in refused({"a": GOOD}, data=25)
    assert "24 bytes at its end belong to no tensor" in refused({})


def test_tells_all_problems_of_a_file_but_not_thousands(refused):
    message = refused({"a": 1, "b": {**GOOD, "dtype": "F4"}, "c": GOOD})
    assert "2 problems, nothing was written" in message
    assert "a: its entry" in message
    assert "b: stored as F4" in message
    assert "and 4980 more" in refused({str(i): i for i in range(5000)})


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), os.mkfifo, lambda path: None], ids=["folder", "pipe", "nothing"]
)
def test_refuses_what_is_no_file_without_waiting_for_it(tmp_path, make):
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a regular file|No such file"):
        read_header(tmp_path / "model.safetensors")
