"""Shards are written by any thread in any order, and a full disk is said to be one."""

import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoint import writer as writer_module
from freemerge.checkpoint.checksum import PIECE, PieceChecksum, checksum
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.errors import OutputError
from freemerge.kernels.array import BFLOAT16

F32 = np.dtype(np.float32)


def test_pieces_from_many_threads_make_the_tensor(tmp_path):
    values = np.arange(100_003, dtype=np.float32)
    shards = plan_shards([Entry("a", F32, values.shape), Entry("b", BFLOAT16, (3, 5))], 10**9)
    with CheckpointWriter(tmp_path, shards) as out, ThreadPoolExecutor(4) as pool:
        starts = np.random.default_rng(0).permutation(range(0, values.size, 1000))
        list(pool.map(lambda start: out.write("a", start, values[start : start + 1000]), starts))
        out.map("b")[...] = 7
        np.testing.assert_array_equal(out.read("a"), values)
        assert (out.read("b") == 7).all()
        assert not out.read("b").flags.writeable
        out.finish()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    values = np.arange(1000, dtype=np.float32)
    with CheckpointWriter(tmp_path, plan_shards([Entry("a", F32, (1000,))], 10**9), fsync=False) as out:
        out.write("a", 0, values)
        np.testing.assert_array_equal(out.read("a"), values)


@pytest.mark.parametrize(
    ("first", "array"),
    [(8, np.zeros(3, F32)), (-1, np.zeros(3, F32)), (0, np.zeros(3, np.float64)), (0, np.zeros(11, F32))],
)
def test_what_does_not_fit_the_tensor_is_refused(tmp_path, first, array):
    with (
        CheckpointWriter(tmp_path, plan_shards([Entry("a", F32, (10,))], 10**9)) as out,
        pytest.raises(ValueError, match="a is float32"),
    ):
        out.write("a", first, array)


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "quota"), (errno.EIO, "could not be written")]
)
def test_a_failing_disk_is_an_output_error(tmp_path, monkeypatch, code, said):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with CheckpointWriter(tmp_path, plan_shards([Entry("a", F32, (1000,))], 10**9)) as out:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=said) as caught:
            out.write("a", 0, np.zeros(1000, F32))
    if code == errno.ENOSPC:
        assert "3.9 KiB did not fit" in str(caught.value)
        assert "--resume" in str(caught.value)


def test_a_write_of_nothing_is_a_full_disk(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path, plan_shards([Entry("a", F32, (10,))], 10**9)) as out:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OutputError, match="disk full"):
            out.write("a", 0, np.zeros(10, F32))


def test_missing_room_shows_before_any_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"needs 4\.\d KiB and has 1000 B free"):
        CheckpointWriter(tmp_path, plan_shards([Entry("a", F32, (1000,))], 10**9))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_preallocation_fails_on_a_disk_another_program_fills(small_disk, monkeypatch):
    monkeypatch.setattr(writer_module, "check_room", lambda *_: None)
    with pytest.raises(OutputError, match="disk full while writing"):
        CheckpointWriter(small_disk, plan_shards([Entry("a", F32, (300_000,))], 10**9))


def test_preallocated_room_cannot_be_taken_away(small_disk):
    with CheckpointWriter(small_disk, plan_shards([Entry("a", F32, (200_000,))], 10**9), fsync=False) as out:
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "other").write_bytes(bytes(1 << 20))
        out.write("a", 0, np.ones(200_000, F32))
        out.finish()


def test_opening_again_keeps_what_was_written(tmp_path):
    shards = plan_shards([Entry("a", F32, (10,)), Entry("b", F32, (10,))], 40)
    with CheckpointWriter(tmp_path, shards) as out:
        out.write("a", 0, np.ones(10, F32))
    with CheckpointWriter(tmp_path, shards) as out:
        assert (out.read("a") == 1).all()


def checksum_by_definition(data: bytes) -> str:
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_64(piece).digest() for piece in pieces)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17])
def test_checksum_is_the_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert checksum(data) == checksum_by_definition(data)
    assert checksum(np.frombuffer(data, np.uint8)) == checksum(data)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 2**32), tile=st.sampled_from([PIECE, 2 * PIECE, PIECE // 4]))
def test_checksum_of_pieces_in_any_order(seed, tile):
    data = np.arange(3 * PIECE + 1000, dtype=np.uint32).view(np.uint8)[: 3 * PIECE + 1000]
    pieces = PieceChecksum(data.size)
    order = np.random.default_rng(seed).permutation(-(-data.size // PIECE)) if tile < PIECE else [0]
    for piece in order:
        part = data[piece * PIECE : (piece + 1) * PIECE] if tile < PIECE else data
        for start in range(0, part.size, tile):
            pieces.update(int(piece) * PIECE + start, part[start : start + tile])
    assert pieces.hexdigest() == checksum(data)


def test_checksum_refuses_gaps_and_repeats():
    pieces = PieceChecksum(2 * PIECE)
    pieces.update(0, bytes(PIECE))
    with pytest.raises(ValueError, match="1 of 2 pieces are missing"):
        pieces.hexdigest()
    with pytest.raises(ValueError, match="came when"):
        pieces.update(PIECE + 5, bytes(5))
    with pytest.raises(ValueError, match="came when"):
        pieces.update(0, bytes(5))
