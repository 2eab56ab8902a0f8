"""freemerge experts: the sparse experts beside a merged model."""

from dataclasses import asdict

import typer

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
    base: str = typer.Argument(..., help="The model the expert is to be plugged into: a merged or a base model."),
    model: str = typer.Argument(..., help="The fine-tuned model."),
    out: str = typer.Argument(..., metavar="OUT", help="The expert file to write (.safetensors)."),
    density: float = typer.Option(0.01, min=0.0, max=1.0, help="Share of the entries to keep."),
) -> None:
    """Write the sparse expert that turns one model into another, as far as its density allows.

    Example: freemerge experts extract merged runs/law merged/experts/law.safetensors
    """
    from freemerge.api import extract_expert

    extract_expert(base, model, out, density=density)
    typer.echo(f"{out}: {model} relative to {base}, density {density:g}")
