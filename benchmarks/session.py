"""One run of compare.py: what was measured so far, and the floor it is held against."""

import argparse
import datetime
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import machine
import processes
import results
import synthetic
from commands import WrongResult, empty_folder, inputs_of, timed_merge


@dataclass
class Session:
    """Measurements by the name of their row."""

    options: argparse.Namespace
    runs: dict[str, list[processes.Run]] = field(default_factory=lambda: defaultdict(list))
    floors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    estimates: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rows: list[results.Row] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.options.data / "out" / "merged"

    def prepare(self, size: float, experts: int) -> synthetic.Checkpoints:
        """The model, made if it is not there, read once so that the page cache is warm."""
        say(f"model of {synthetic.FULL.scaled(size).parameters() / 1e9:.2f} billion parameters, {experts} experts")
        model = synthetic.make_checkpoints_in_process(self.options.data / f"llama-{size:g}", size, experts)
        needed = (len(model.directories) + 1) * model.bytes_each()
        if machine.memory("MemAvailable") < needed * 1.05:
            say(f"  warning: {needed / 1e9:.1f} GB do not fit into free memory: the page cache will not be warm")
        time_floor([directory / "model.safetensors" for directory in model.directories], self.out)
        return model

    def time_merge(self, what: str, command: list, name: str, model: synthetic.Checkpoints, *, fsync=False) -> None:
        """One repeat of the row `what`: the floor, then `command`, which makes the merge `name` of commands.py."""
        floor = time_floor(inputs_of(name, model), self.out, fsync=fsync)
        if self.attempt(what, lambda: timed_merge(command, name, model, self.out)):
            self.floors[what].append(floor)
            say(f"  {what}: {self.runs[what][-1].seconds:.2f} s, floor {floor:.2f} s")

    def attempt(self, what: str, run: Callable[[], processes.Run]) -> bool:
        """Keep the result of `run()`, or the reason why there is none; what failed is not tried again."""
        if what in self.failures:
            return False
        try:
            self.runs[what].append(run())
        except (processes.CommandFailed, WrongResult, OSError) as error:
            self.failures[what] = str(error)
            say(f"  {what}: FAILED: {error}")
            return False
        return True

    def seconds(self) -> dict[str, float]:
        measured = {what: statistics.median(run.seconds for run in runs) for what, runs in self.runs.items() if runs}
        return measured | self.estimates

    def floor(self) -> dict[str, float]:
        return {what: statistics.median(floors) for what, floors in self.floors.items()}

    def peaks(self) -> dict[str, int]:
        return {what: max(run.peak_bytes for run in runs) for what, runs in self.runs.items() if runs}

    def keep(self, what: str, *, size="", experts="", gigabytes: float | None = None, notes: str = "") -> None:
        """Append the row of a finished measurement; nothing if there is none."""
        if what not in self.seconds():
            return
        seconds, floor, runs = self.seconds()[what], self.floor().get(what), self.runs.get(what, [])
        busy = (
            f"{sum(run.cpu_seconds for run in runs) / sum(run.seconds for run in runs):.1f} cores busy" if runs else ""
        )
        row = results.Row(
            date=datetime.datetime.now().isoformat(timespec="seconds"),
            **machine.describe(),
            versions=machine.versions(),
            what=what,
            size=str(size),
            experts=str(experts),
            gigabytes="" if gigabytes is None else f"{gigabytes:.4g}",
            seconds=f"{seconds:.4g}",
            floor=f"{floor:.4g}" if floor else "",
            times_floor=f"{seconds / floor:.2f}" if floor else "",
            peak_mib=f"{self.peaks()[what] / 2**20:.0f}" if runs else "",
            repeats=str(len(runs) or self.options.repeats),
            notes="; ".join(filter(None, [notes, busy, machine.others()])),
        )
        results.append(self.options.results / "compare.csv", row)
        self.rows.append(row)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def time_floor(inputs: list[Path], out: Path, *, fsync: bool = False) -> float:
    """Seconds of `cat` of all inputs to nowhere and `cp` of one, as large as the output; and of `sync` of the copy."""
    empty_folder(out.parent)
    copy = out.parent / "copy.safetensors"
    commands = [["cat", *inputs], ["cp", "--reflink=never", inputs[0], copy]] + ([["sync", copy]] if fsync else [])
    seconds = sum(processes.run(command).seconds for command in commands)
    shutil.rmtree(out.parent)
    return seconds


def gigabytes(model: synthetic.Checkpoints, name: str) -> float:
    """Read and written, in units of 10^9 bytes; sparse experts and small files not counted."""
    return (len(inputs_of(name, model)) + 1) * model.bytes_each() / 1e9
