"""What an interrupted run had finished: one JSON line a task. A torn end, after a crash, is cut off."""

import errno
import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_FSYNC_EVERY = 1.0  # seconds


class Journal:
    """Lines are appended whole, from any thread. `done` holds what earlier runs recorded."""

    def __init__(self, path: Path, *, fsync: bool):
        self.done, valid = _read(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, valid)
        self._lock = threading.Lock()
        # A slow disk must hold up neither the workers nor their records.
        self._syncer = ThreadPoolExecutor(1, "journal") if fsync else None
        self._syncing: Future | None = None
        self._synced = time.monotonic()

    def append(self, key: str, record: dict) -> None:
        line = (json.dumps([key, record], separators=(",", ":")) + "\n").encode()
        with self._lock:
            end = os.fstat(self._file).st_size
            if os.write(self._file, line) != len(line):
                os.ftruncate(self._file, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._sync_if_due()

    def _sync_if_due(self) -> None:
        now = time.monotonic()
        if self._syncer is None or now - self._synced < _FSYNC_EVERY or (self._syncing and not self._syncing.done()):
            return
        self._synced = now
        self._syncing = self._syncer.submit(os.fsync, self._file)

    def empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def close(self) -> None:
        if self._syncer is not None:
            self._syncer.shutdown()
        os.close(self._file)


def _read(path: Path) -> tuple[dict[str, dict], int]:
    """The records, the last one of a key counting, and how many bytes of the file they take."""
    done: dict[str, dict] = {}
    valid = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            key, record = json.loads(line)
        except (ValueError, TypeError):
            break
        if not (line.endswith(b"\n") and isinstance(key, str) and isinstance(record, dict)):
            break
        done[key] = record
        valid += len(line)
    return done, valid
