"""freemerge inspect: what models hold and what a filter would remove."""

from pathlib import Path

import typer

from freemerge.cli.output import print_json, print_table


def command(
    models: list[str] = typer.Argument(..., metavar="MODEL...", help="Folders, files or hub names."),
    base: str = typer.Option(None, "--base", "-b", help="The base: task vectors are model minus base."),
    cutoff: float = typer.Option(0.7, help="Cutoff of the high-pass, a ratio (docs/filter.md)."),
    radius_from: str = typer.Option("min", help="The side the cutoff is a ratio of: min, max or diagonal."),
    inner_ring: str = typer.Option("clean", help="clean or official."),
    spectrum: Path = typer.Option(None, help="Write a picture of the task vectors' spectra to this PNG file."),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Read .bin and .pt files too (torch, weights only)."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show tensors, dtypes and task vectors of models, and what a filter removes from them.

    Example: freemerge inspect runs/math --base llama
    """
    from freemerge.inspect import inspect_models

    mask = {"cutoff": cutoff, "radius_from": radius_from, "inner_ring": inner_ring}
    found = inspect_models(models, base=base, **mask, spectrum=spectrum, allow_pickle=allow_pickle)
    rows = [row.as_dict() for row in found]
    if as_json:
        print_json(rows)
    else:
        # without a base, nothing is known of task vectors
        known = [column for column in rows[0] if any(row[column] is not None for row in rows)]
        print_table([{column: row[column] for column in known} for row in rows])
