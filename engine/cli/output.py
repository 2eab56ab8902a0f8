"""What commands print: tables and JSON on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import typer


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


def print_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Aligned columns, numbers to the right, empty ones left out; plain text, so that it is the same in a pipe."""
    rows = list(rows)
    columns = [c for c in (rows[0] if rows else []) if any(row.get(c) is not None for row in rows)]
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    for line in cells:
        padded = (f"{c:>{w}}" if right else f"{c:<{w}}" for c, w, right in zip(line, widths, numeric, strict=True))
        typer.echo("  ".join(padded).rstrip())


def note(text: str) -> None:
    typer.echo(text, err=True)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return (" x " if all(isinstance(item, int) for item in value) else ", ").join(map(_text, value))
    return str(value)


@contextmanager
def progress_bar(title: str, *, quiet: bool = False):
    """A function of (done_bytes, total_bytes) that moves a bar on stderr; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(title, total=None)
        # rich redraws in a thread of its own, ten times a second; this only stores two numbers under a lock
        yield lambda done, total: bar.update(task, completed=done, total=total)
