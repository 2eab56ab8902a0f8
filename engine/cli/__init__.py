"""The command line: one file a command; nothing heavy is imported before a command needs it."""

import sys

import typer
from typer.core import TyperGroup

from freemerge import __version__
from freemerge.cli import experts, info, inspect, merge, methods, verify
from freemerge.errors import FreemergeError

EXIT_CODES = "Exit codes: 0 the result is on disk, 1 failed (what was there before is untouched), 2 bad input."


class _Commands(TyperGroup):
    """Turns freemerge's own errors into a message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except FreemergeError as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(1) from None


# rich's help pages cost more than the rest of the start-up together
app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Merge fine-tuned checkpoints of one base model at the speed of reading and writing the bytes.",
    epilog=EXIT_CODES,
)
app.command("merge")(merge.command)
app.command("methods")(methods.command)
app.command("inspect")(inspect.command)
app.add_typer(experts.app, name="experts")
app.command("verify")(verify.command)
app.command("info")(info.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"freemerge {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    if sys.argv[1:] == ["methods"]:  # typer would import pydantic to read no parameters: longer than the answer takes
        methods.print_list()
        return
    app(prog_name="freemerge")
