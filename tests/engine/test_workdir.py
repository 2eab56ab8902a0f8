"""A result appears complete or not at all, whatever happens to the process that makes it."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from freemerge.checkpoint import workdir as workdir_module
from freemerge.checkpoint.workdir import WorkDir
from freemerge.errors import OutputError

FINGERPRINT = {"recipe": "1", "version": "0.1.0"}


def open_workdir(out, fingerprint=FINGERPRINT, *, overwrite=False, resume=False):
    return WorkDir.open(out, fingerprint=fingerprint, overwrite=overwrite, resume=resume, fsync=False)


def leftovers(out):
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}"))


def publish(out, text, **flags):
    with open_workdir(out, **flags) as work:
        (work.staging / "config.json").write_text(text)
        work.publish()


def interrupted(out, *keys, fingerprint=FINGERPRINT, **flags):
    with open_workdir(out, fingerprint, **flags) as work:
        for key in keys:
            (work.staging / key).write_text(key)
            work.record(key, {"checksum": key.upper()})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "parent" / "merged"


@pytest.mark.parametrize("fsync", [True, False])
def test_publish_makes_the_directory_and_leaves_nothing_else(out, fsync):
    with WorkDir.open(out, fingerprint="x", overwrite=False, resume=False, fsync=fsync) as work:
        (work.staging / "config.json").write_text("new")
        work.record("a", {})
        assert not out.exists()
        work.publish()
    assert (out / "config.json").read_text() == "new"
    assert leftovers(out) == []


def test_an_existing_output_is_kept_without_overwrite(out):
    publish(out, "old")
    with pytest.raises(OutputError, match="--overwrite"):
        open_workdir(out)
    assert (out / "config.json").read_text() == "old"
    assert leftovers(out) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_keeps_the_old_until_the_last_moment(out, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(workdir_module, "exchange", lambda *_: False)
    publish(out, "old")
    with open_workdir(out, overwrite=True) as work:
        (work.staging / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"
        work.publish()
    assert (out / "config.json").read_text() == "new"
    assert leftovers(out) == []


def test_overwrite_does_not_delete_what_is_no_checkpoint(out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("...")
    with pytest.raises(OutputError, match="no checkpoint"):
        open_workdir(out, overwrite=True)


def test_a_file_is_not_replaced(out):
    out.parent.mkdir()
    out.write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        open_workdir(out, overwrite=True)


def test_an_output_that_appears_meanwhile_is_kept(out):
    with open_workdir(out) as work:
        work.record("a", {})
        out.mkdir()
        (out / "config.json").write_text("another's")
        with pytest.raises(OutputError, match="exists"):
            work.publish()
    assert (out / "config.json").read_text() == "another's"
    assert leftovers(out) == [".merged.freemerge"]


def test_a_failed_second_rename_puts_the_old_back(out, monkeypatch):
    publish(out, "old")
    monkeypatch.setattr(workdir_module, "exchange", lambda *_: False)
    rename = workdir_module.Path.rename

    def fail_from_staging(path, target):
        if path.name == "staging":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with open_workdir(out, overwrite=True) as work:
        work.record("a", {})
        monkeypatch.setattr(workdir_module.Path, "rename", fail_from_staging)
        with pytest.raises(OutputError, match="Input/output error"):
            work.publish()
    assert (out / "config.json").read_text() == "old"


def test_an_unfinished_run_asks_for_resume_or_overwrite(out):
    interrupted(out, "a")
    with pytest.raises(OutputError, match=r"1 tasks done.*--resume continues it, --overwrite discards"):
        open_workdir(out)
    with open_workdir(out, resume=True) as work:
        assert work.done == {"a": {"checksum": "A"}}
        assert (work.staging / "a").exists()
    with open_workdir(out, overwrite=True) as work:
        assert work.done == {}
        assert list(work.staging.iterdir()) == []


def test_a_run_that_finished_nothing_leaves_nothing(out):
    interrupted(out)
    assert leftovers(out) == []


def test_resume_of_another_merge_says_what_differs(out):
    interrupted(out, "a")
    with pytest.raises(OutputError, match=r"version: 0.1.0 then, 0.2.0 now"):
        open_workdir(out, {"recipe": "1", "version": "0.2.0"}, resume=True)
    interrupted(out, "a", fingerprint="plain text", overwrite=True)
    with pytest.raises(OutputError, match=r"recipe, inputs or version"):
        open_workdir(out, "other text", resume=True)
    with open_workdir(out, "plain text", resume=True) as work:
        assert list(work.done) == ["a"]


def test_resume_with_nothing_to_resume_starts(out):
    publish(out, "new", resume=True)
    assert (out / "config.json").read_text() == "new"


@pytest.mark.parametrize("torn", [b'["b",{"che', b'["b",{}]', b"\0\0\0\0\n", b'"b"\n', b'["b"]\n', b"\xff\xfe\n"])
def test_a_torn_end_of_the_journal_is_not_believed(out, torn):
    interrupted(out, "a")
    journal = out.parent / ".merged.freemerge" / "journal"
    journal.write_bytes(journal.read_bytes() + torn)
    with open_workdir(out, resume=True) as work:
        assert list(work.done) == ["a"]
        work.record("c", {})
    with open_workdir(out, resume=True) as work:
        assert list(work.done) == ["a", "c"]


def test_verify_done_forgets_what_does_not_hold(out):
    interrupted(out, "a", "b", "c")
    with open_workdir(out, resume=True) as work:
        (work.staging / "b").unlink()
        assert work.verify_done(
            lambda key, record: (work.staging / key).exists() and record["checksum"] == key.upper()
        ) == ["b"]
        assert list(work.done) == ["a", "c"]


def test_a_second_merge_is_told_who_is_at_work(out):
    with open_workdir(out) as work:
        with pytest.raises(
            OutputError, match=rf"another merge into .*merged is running: process {os.getpid()} on .* since 20"
        ):
            open_workdir(out, resume=True)
        work.record("a", {})
    with open_workdir(out, resume=True) as work:
        assert list(work.done) == ["a"]


def test_only_one_of_many_starts(out):
    script = (
        "import sys\nfrom freemerge.checkpoint.workdir import WorkDir\nfrom freemerge.errors import OutputError\n"
        "try: work = WorkDir.open(sys.argv[1], fingerprint='x', overwrite=True, resume=False, fsync=False)\n"
        "except OutputError: print('refused')\n"
        "else: print('started', flush=True); sys.stdin.read(); work.discard()\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [run.stdout.readline().strip() for run in runs]
    for run in runs:
        run.communicate()
    assert sorted(said) == ["refused", "refused", "started"]
    assert leftovers(out) == []


# -- kill -9 ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import pathlib, sys, time
import numpy as np
from freemerge.checkpoint import workdir as workdir_module
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter, checksum, write_file

out, overwrite, resume, can_exchange = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
if not can_exchange:
    workdir_module.exchange = lambda *_: False
tensors = {f"t{i}": np.full((300, 100), i, np.float32) for i in range(60)}
entries = [Entry(name, array.dtype, array.shape) for name, array in tensors.items()]
print("begin", flush=True)
with WorkDir.open(out, fingerprint="same", overwrite=overwrite, resume=resume, fsync=False) as work:
    with CheckpointWriter(work.staging, plan_shards(entries, 2_000_000), fsync=False) as writer:
        work.verify_done(lambda key, record: checksum(writer.read(key)) == record["checksum"])
        for name, array in tensors.items():
            if name not in work.done:
                writer.write(name, 0, array[:150])
                time.sleep(0.002)  # so that most deaths fall into the work
                writer.write(name, 15000, array[150:])
                work.record(name, {"checksum": checksum(array)})
        writer.finish()
    write_file(work.staging / "config.json", b"{}")
    work.publish()
print("published", flush=True)
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_script(out, overwrite, resume, can_exchange=True):
    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        str(out),
        *(str(int(flag)) for flag in (overwrite, resume, can_exchange)),
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "merged"
    run = run_script(out, False, False)
    run.stdout.readline()
    begun = time.monotonic()
    run.stdout.readline()
    seconds = time.monotonic() - begun
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return contents(out), seconds


@pytest.mark.parametrize(("overwrite", "can_exchange"), [(True, True), (True, False), (False, True)])
def test_death_at_any_moment_then_resume(tmp_path, expected, overwrite, can_exchange):
    whole, seconds = expected
    rng = random.Random(overwrite + 2 * can_exchange)
    for trial in range(5):
        out = tmp_path / f"merged{trial}"
        if overwrite:
            out.mkdir()
            (out / "config.json").write_text("old")
        run = run_script(out, overwrite, False, can_exchange)
        run.stdout.readline()
        time.sleep(rng.uniform(0, seconds))
        run.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        run.communicate()
        # Where the system cannot exchange, the old one is in the work directory for an instant between two renames.
        if out.exists() or (overwrite and can_exchange):
            assert contents(out) in ([{"config.json": b"old"}, whole] if overwrite else [whole])
        again = run_script(out, overwrite or out.exists(), True, can_exchange)
        _, errors = again.communicate()
        assert again.returncode == 0, errors
        assert contents(out) == whole
        assert leftovers(out) == []


class Killed(BaseException):
    """Not an Exception: nothing may handle it."""


def die_at(monkeypatch, point):
    """Let the call number `point` that changes a directory, and every later one, raise Killed."""
    calls = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > point:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(workdir_module, "exchange", mortal(workdir_module.exchange))


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("point", range(10))
def test_death_at_every_step_of_publication(out, monkeypatch, point, can_exchange):
    publish(out, "old")
    work = open_workdir(out, overwrite=True)
    (work.staging / "config.json").write_text("new")
    work.record("a", {})
    with monkeypatch.context() as patch:
        if not can_exchange:
            patch.setattr(workdir_module, "exchange", lambda *_: False)
        die_at(patch, point)
        try:
            work.publish()
        except Killed:
            os.close(work._lock._file)  # what the kernel does
    if can_exchange:
        assert (out / "config.json").read_text() in ("old", "new")
    with open_workdir(out, overwrite=True, resume=True) as again:
        assert (out / "config.json").read_text() in ("old", "new")
        (again.staging / "config.json").write_text("newer")
        again.publish()
    assert (out / "config.json").read_text() == "newer"
    assert leftovers(out) == []


def test_points_of_death_cover_the_whole_publication(out, monkeypatch):
    publish(out, "old")
    with open_workdir(out, overwrite=True) as work:
        (work.staging / "config.json").write_text("new")
        with monkeypatch.context() as patch:
            die_at(patch, 10)
            work.publish()
