"""Whole processes, timed from outside: wall clock, processor time, and the peak of anonymous memory of their tree."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.01  # below 1 % of a core; shorter peaks escape


class CommandFailed(Exception):
    """A timed command ended with another exit code than 0; the text holds the command and the end of what it said."""


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Highest sum of RssAnon (/proc/PID/status) over the process and its descendants."""


def run(command: Sequence[str | os.PathLike], *, env: dict[str, str] | None = None) -> Run:
    """Run `command` to its end. Raises CommandFailed."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, **(env or {})}
        )
        watch = PeakWatch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = watch.stop()
        if process.returncode:
            said.seek(0)
            tail = said.read().decode(errors="replace").strip().splitlines()[-8:]
            raise CommandFailed(f"{' '.join(map(str, command))}: exit code {process.returncode}\n" + "\n".join(tail))
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak)


class PeakWatch(threading.Thread):
    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()
        self.start()

    def run(self):
        while True:
            self.peak = max(self.peak, sum(map(anonymous_bytes, tree(self.pid))))
            if self.done.wait(POLL_SECONDS):
                return

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else 0


def tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    found = [pid]
    for parent in found:
        found += children(parent)
    return found


def children(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end while we look
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found
