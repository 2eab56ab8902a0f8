"""freemerge experts: the sparse experts beside a merged model."""

from dataclasses import asdict

import typer

from freemerge.cli.arguments import PARAMETER, parse_parameters
from freemerge.cli.output import print_json, print_table

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, apply or extract the sparse experts of a merged model."
)


@app.command("list")
def list_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with method free."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the experts of a merged model.

    Example: freemerge experts list merged
    """
    from freemerge.experts.apply import list_experts

    experts = [asdict(expert) for expert in list_experts(merged)]
    if as_json:
        print_json(experts)
    else:
        print_table(experts)


@app.command("apply")
def apply_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with method free."),
    name: str = typer.Argument(..., help="The expert, as `freemerge experts list` names it."),
    out: str = typer.Argument(..., metavar="OUT", help="The folder to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in OUT, once the result is complete."),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Write a plain checkpoint: the merged model with one expert in it.

    Example: freemerge experts apply merged math merged-math
    """
    from freemerge.experts.apply import apply_expert

    apply_expert(merged, name, out, overwrite=overwrite, fsync=not no_fsync)
    typer.echo(f"{out}: {merged} with the expert {name}")


@app.command("extract")
def extract_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge, by any method."),
    model: str = typer.Argument(..., help="The fine-tuned model: folder, file or hub name."),
    name: str = typer.Option(None, help="What to call the expert [default: the last part of the model's path]."),
    parameter: list[str] = PARAMETER,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an expert of this name."),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Read .bin and .pt files too (torch, weights only)."
    ),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Put one more expert beside a merged model: the sparse part of a fine-tuned model, cut out as free does.

    Example: freemerge experts extract merged runs/law -p density=0.02
    """
    from freemerge.experts.from_model import extract_expert

    options = {"name": name, "overwrite": overwrite, "allow_pickle": allow_pickle, "fsync": not no_fsync}
    typer.echo(extract_expert(merged, model, **options, **parse_parameters(parameter)))
