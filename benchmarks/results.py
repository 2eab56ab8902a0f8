"""Rows of results: kept in a CSV file for ever, shown as Markdown tables."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement. Empty strings where a column does not apply."""

    date: str
    cpu: str
    cores: str
    memory_gib: str
    versions: str
    what: str
    size: str
    experts: str
    gigabytes: str
    """Bytes read and written, in units of 10^9."""
    seconds: str
    """Median."""
    floor: str
    """Seconds of `cat` of the inputs and `cp` of one, median of the same run."""
    times_floor: str
    peak_mib: str
    """Highest anonymous memory of any repeat."""
    repeats: str
    notes: str


def append(path: Path, row: Any) -> None:
    """Of any dataclass of strings; one file holds rows of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow([field.name for field in fields(row)])
        writer.writerow(astuple(row))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, columns padded so that it reads as plain text too."""
    lines = [tuple(head), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
