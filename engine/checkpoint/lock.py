"""One merge at a time into one output directory: a lock the kernel lets go of however the process ends."""

import errno
import fcntl
import json
import os
import time
from pathlib import Path

from freemerge.errors import OutputError


class Lock:
    """A locked file in a directory that its last holder removes. Raises OutputError naming who holds it."""

    def __init__(self, path: Path, out: Path):
        self.path = path
        self._file = self._acquire(out)
        holder = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder).encode(), 0)

    def _acquire(self, out: Path) -> int:
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # its last holder has just removed the directory
            except OSError as error:
                raise OutputError(f"{self.path.parent} could not be created: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass  # removed between opening and locking
            except OSError as error:
                holder = _holder(file)
                os.close(file)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise OutputError(f"{self.path} could not be locked: {error.strerror}") from error
                raise OutputError(
                    f"another merge into {out} is running: {holder}; wait for it or choose another output directory"
                ) from error
            os.close(file)

    def release(self) -> None:
        os.close(self._file)


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has just started"
