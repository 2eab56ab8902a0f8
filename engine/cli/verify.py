"""freemerge verify: whether a merged model is still what was written."""

import typer

from freemerge.cli.output import note, print_json


def command(
    folder: str = typer.Argument(..., metavar="OUT", help="A folder written by freemerge merge."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check every byte of a merged model against the checksums in its freemerge.json.

    Example: freemerge verify merged
    """
    from freemerge.checkpoint.verify import verify

    problems = [str(problem) for problem in verify(folder).problems]
    if as_json:
        print_json({"folder": folder, "problems": problems})
    elif problems:
        note(
            "\n".join([f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}", *(f"  {p}" for p in problems)])
        )
    else:
        typer.echo(f"{folder}: complete, all checksums agree")
    raise typer.Exit(1 if problems else 0)
