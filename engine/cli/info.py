"""freemerge info: what is built and in use on this machine; the first thing to paste into a bug report."""

import typer

from freemerge.cli.output import print_json, print_table


def command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show versions, instruction set, threads, memory, devices, and which version of each op runs here and why.

    Example: freemerge info
    """
    from freemerge.info import facts, ops

    if as_json:
        print_json({**facts(), "ops": ops()})
        return
    for key, value in facts().items():
        typer.echo(f"{key:<16}{value}")
    typer.echo()
    print_table(ops())
