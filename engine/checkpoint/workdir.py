"""A result is built in a neighbouring directory and appears under its name complete or not at all.

parent/OUT                     the old result, if any: untouched until the last moment
parent/.OUT.freemerge/lock     held by the running merge
                      state    what is being made; while publishing, also which directory is the new one
                      journal  what is finished
                      staging  the result; after an exchange, the old one
                      old      the old one, where the system cannot exchange
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from freemerge.checkpoint.journal import Journal
from freemerge.checkpoint.lock import Lock
from freemerge.checkpoint.rename import exchange, fsync_path, fsync_tree
from freemerge.checkpoint.writer import disk_errors, write_file
from freemerge.errors import OutputError

_CHECKPOINT_FILES = ("*.safetensors", "*.index.json", "config.json", "freemerge.json", "*.bin", "*.pt", "*.pth")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise OutputError where a result must not appear as `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; the output is a directory: choose another name")
    if not overwrite:
        raise OutputError(
            f"{out} exists; --overwrite replaces it when the new result is complete, or choose another name"
        )
    if any(out.iterdir()) and not any(any(out.glob(pattern)) for pattern in _CHECKPOINT_FILES):
        raise OutputError(
            f"{out} holds files but no checkpoint, so --overwrite does not delete it; choose another name"
        )


class WorkDir:
    """The work directory of one merge, made by `open`. Leaving a `with` block keeps what is done for --resume."""

    staging: Path
    done: dict[str, dict]

    @classmethod
    def open(
        cls, out: Path, *, fingerprint: str | Mapping[str, object], overwrite: bool, resume: bool, fsync: bool = True
    ) -> "WorkDir":
        """Lock the neighbouring work directory of `out` and make it ready.

        Args:
            fingerprint: what the bytes of the result depend on; as a mapping, an error can say which part has changed.
            overwrite: replace an existing `out` when the new result is complete; discard an unfinished one.
            resume: continue an unfinished run of the same fingerprint; starts anew where there is none.

        Raises:
            OutputError: another merge into `out` is running, `out` exists, or an unfinished run is in the way.
        """
        if not isinstance(fingerprint, str):
            fingerprint = json.dumps(fingerprint, sort_keys=True)
        work = cls(Path(out).resolve(), overwrite, fsync)
        try:
            with disk_errors(work.folder, lambda: 4096):
                work._recover()
                work._check_out()
                work._check_leftovers(fingerprint, resume)
                work._start(fingerprint)
        except BaseException:
            work.close()
            raise
        return work

    def __init__(self, out: Path, overwrite: bool, fsync: bool):
        self.out = out
        self._overwrite = overwrite
        self.folder = out.parent / f".{out.name}.freemerge"
        self.staging = self.folder / "staging"
        self.done = {}
        self._fsync = fsync
        self._journal: Journal | None = None
        self._lock: Lock | None = Lock(self.folder / "lock", out)

    # -- opening ------------------------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.folder / "state"

    @property
    def _old(self) -> Path:
        return self.folder / "old"

    def _state(self) -> dict:
        try:
            return json.loads(self._state_path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    def _write_state(self, **state) -> None:
        beside = self.folder / "state.new"
        write_file(beside, json.dumps(state).encode())
        if self._fsync:
            fsync_path(beside)
        beside.rename(self._state_path)
        if self._fsync:
            fsync_path(self.folder)

    def _recover(self) -> None:
        """Bring a publication that was cut short to one side or the other."""
        new = self._state().get("publishing")
        if new is not None and self.out.exists() and self.out.stat().st_ino == new:
            self._clear()
        elif self._old.exists() and not self.out.exists():
            self._old.rename(self.out)

    def _check_out(self) -> None:
        check_out(self.out, self._overwrite)

    def _check_leftovers(self, fingerprint: str, resume: bool) -> None:
        if not self._recorded():
            self._clear()  # nothing that a resumed run could save
            return
        if resume:
            problems = _differences(self._state().get("fingerprint", ""), fingerprint)
            if problems:
                raise OutputError(
                    f"the unfinished run in {self.folder} cannot be resumed, it was another merge:\n"
                    + "\n".join(f"  {problem}" for problem in problems)
                    + f"\nRun it without --resume and with --overwrite to start anew, or delete {self.folder}."
                )
        elif self._overwrite:
            self._clear()
        else:
            raise OutputError(
                f"{self.folder} holds an unfinished run ({self._recorded()} tasks done); "
                "--resume continues it, --overwrite discards it and starts anew"
            )

    def _recorded(self) -> int:
        path = self.folder / "journal"
        return path.read_bytes().count(b"\n") if path.exists() and self.staging.exists() else 0

    def _start(self, fingerprint: str) -> None:
        self.staging.mkdir(exist_ok=True)
        self._write_state(fingerprint=fingerprint)
        self._journal = Journal(self.folder / "journal", fsync=self._fsync)
        self.done = self._journal.done

    # -- working ------------------------------------------------------------------------------------------------

    def record(self, key: str, record: dict) -> None:
        """Note that the task `key` is finished. Any thread; on the disk within seconds."""
        with disk_errors(self.folder / "journal", lambda: len(key)):
            self._journal.append(key, record)

    def verify_done(self, holds: Callable[[str, dict], bool], threads: int = 4) -> list[str]:
        """Forget the tasks in `done` for which `holds(key, record)` is false; answers their keys.

        After a power cut the journal may know of bytes that never reached the disk: `holds` re-reads them.
        """
        with ThreadPoolExecutor(threads) as pool:
            good = list(pool.map(lambda item: holds(*item), self.done.items()))
        lost = [key for key, held in zip(self.done, good, strict=True) if not held]
        for key in lost:
            del self.done[key]
        return lost

    # -- ending -------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Make the staged result appear as `out`, complete and durable, and remove the work directory."""
        with disk_errors(self.out, lambda: 0):
            self._check_out()  # it may have appeared meanwhile
            if self._fsync:
                fsync_tree(self.staging)
            self._write_state(**self._state(), publishing=self.staging.stat().st_ino)
            self._appear()
            if self._fsync:
                fsync_path(self.out.parent)
        self.discard()

    def _appear(self) -> None:
        if not self.out.exists():
            self.staging.rename(self.out)
        elif not exchange(self.staging, self.out):
            self.out.rename(self._old)
            try:
                self.staging.rename(self.out)
            except BaseException:
                self._old.rename(self.out)
                raise

    def discard(self) -> None:
        """Remove the work directory and let go of the lock."""
        self._close_journal()
        if self._lock is not None:
            self._clear()
            self._remove_lock()

    def close(self) -> None:
        """Let go of the lock and keep what is done for --resume.

        With nothing done, or all of it published, nothing stays behind.
        """
        if self._lock is None:
            return
        self._close_journal()
        self._recover()
        if not self._recorded():
            self.discard()
            return
        self._lock.release()
        self._lock = None

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _clear(self) -> None:
        """Remove everything but the lock.

        The journal first, so that no resumed run believes in what is half gone; the state last, since it tells the new
        result from the old one.
        """
        (self.folder / "journal").unlink(missing_ok=True)
        for folder in (self.staging, self._old):
            shutil.rmtree(folder, ignore_errors=True)
        self._state_path.unlink(missing_ok=True)

    def _remove_lock(self) -> None:
        self._lock.path.unlink(missing_ok=True)
        with suppress(OSError):  # the next merge may be in it already
            self.folder.rmdir()
        self._lock.release()
        self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _differences(old: str, new: str) -> list[str]:
    """What differs between two fingerprints, part by part where they are JSON objects."""
    if old == new:
        return []
    try:
        before, after = json.loads(old), json.loads(new)
    except ValueError:
        before = after = None
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ["recipe, inputs or version of freemerge have changed"]
    return [
        f"{key}: {before.get(key, 'absent')} then, {after.get(key, 'absent')} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
