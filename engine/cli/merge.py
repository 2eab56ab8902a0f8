"""freemerge merge: a recipe, or the same by flags."""

import dataclasses
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from freemerge.cli.arguments import PARAMETER, parse_parameters
from freemerge.cli.output import note, print_json, print_table, progress_bar
from freemerge.errors import InputError
from freemerge.sizes import parse_size, readable_size

_BYTES = ("bytes", "memory", "largest")  # what the keys of sizes in bytes have in their names
_NAMED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)=(.+)")


def command(
    recipe: str = typer.Argument(None, metavar="RECIPE.yml", help="A recipe in mergekit's YAML; or use --method."),
    target: str = typer.Argument(None, metavar="OUT", help="The folder to write; or use -o."),
    method: str = typer.Option(
        None, "--method", "-m", help="Merge by flags: the method (freemerge methods lists them)."
    ),
    base: str = typer.Option(None, "--base", "-b", help="The base model: folder, file or hub name, or MODEL+ADAPTER."),
    expert: list[str] = typer.Option(
        [], "--expert", "-e", metavar="[NAME=]MODEL", help="A fine-tuned model, or a LoRA adapter; repeat it."
    ),
    parameter: list[str] = PARAMETER,
    out: str = typer.Option(None, "--out", "-o", help="The folder to write."),
    dtype: str = typer.Option(None, help="Dtype of the result [default: the recipe's, else the base's]."),
    device: str = typer.Option(
        "auto", help="auto (all GPUs, or the CPU where none can be used), cpu, cuda, or cuda:N for one of them."
    ),
    threads: int = typer.Option(0, min=0, help="Threads; 0 is one for each core."),
    max_memory: str = typer.Option("2GiB", help="Host memory to stay under, mapped files not counted."),
    max_gpu_memory: str = typer.Option(None, help="Memory to use on each GPU [default: 80 % of what is free]."),
    shard_size: str = typer.Option("5GB", help="Most bytes in one file of the result."),
    continue_from: str = typer.Option(
        None, metavar="MERGED", help="Add the experts to an earlier merge (opcm): its output folder."
    ),
    keep_state: bool = typer.Option(
        None, "--keep-state/--no-state", help="Leave what --continue-from needs beside the result [default: if it can]."
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue an interrupted merge into the same folder."),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace what is in the folder, once the result is complete."
    ),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Read .bin and .pt files too (torch, weights only)."
    ),
    allow_nonfinite: bool = typer.Option(False, "--allow-nonfinite", help="Let NaN and infinities pass."),
    no_fsync: bool = typer.Option(
        False, "--no-fsync", help="Do not wait for the disk: faster, not safe against power loss."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan, tensor by tensor, and write nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print the result (or the plan) as JSON."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress bar, no summary."),
) -> None:
    """Merge fine-tuned models of one base into one model.

    \b
    freemerge merge recipe.yml merged
    freemerge merge --method fr --base llama --expert math=runs/1 --expert runs/code -p scaling=0.3 -o merged
    """
    if method is not None and recipe is not None and target is None:
        recipe, target = None, recipe
    _check_usage(recipe, method, base, expert, target, out, dry_run)
    asked = _recipe(recipe, method, base, expert, parse_parameters(parameter), dtype)
    out = out or target
    from freemerge.api import merge

    options = {
        "out": out,
        "device": device,
        "threads": threads,
        "max_memory": parse_size(max_memory, "--max-memory"),
        "max_gpu_memory": max_gpu_memory and parse_size(max_gpu_memory, "--max-gpu-memory"),
        "continue_from": continue_from,
        "keep_state": keep_state,
        "shard_size": parse_size(shard_size, "--shard-size"),
        "resume": resume,
        "overwrite": overwrite,
        "allow_pickle": allow_pickle,
        "check_finite": not allow_nonfinite,
        "fsync": not no_fsync,
    }
    if dry_run:
        _print_plan(merge(asked, **options, dry_run=True), as_json)
        return
    with _interruptible(out), progress_bar("merging", quiet=quiet) as progress:
        result = merge(asked, **options, progress=progress)
    _print_result(result, as_json, quiet)


def _check_usage(recipe, method, base, experts, target, out, dry_run) -> None:
    problems = []
    if (recipe is None) == (method is None):
        problems.append("give a recipe or --method, one of them")
    if recipe is not None and (base is not None or experts):
        problems.append("--base and --expert go with --method; a recipe names its models itself")
    if target is not None and out is not None:
        problems.append("OUT is given twice, as an argument and with -o")
    if target is None and out is None and not dry_run:
        problems.append("OUT is missing: freemerge merge RECIPE.yml OUT, or -o OUT")
    if problems:
        raise InputError("\n".join([*problems, "`freemerge merge --help` shows both forms."]))


def _recipe(path, method, base, experts, parameters: dict[str, Any], dtype) -> Path | str:
    """The recipe's file where nothing about it is changed, else a recipe's text."""
    if path is not None and not parameters and dtype is None:
        return Path(path)
    from freemerge.recipe import Recipe, load_recipe

    if path is not None:
        return load_recipe(Path(path)).overridden(parameters, dtype).to_yaml()
    return Recipe.from_flags(method, base, _experts(experts), parameters, dtype=dtype).to_yaml()


def _experts(values: list[str]) -> list[str] | dict[str, str]:
    """A list of models, or name -> model where one of them is named."""
    pairs = [_named_model(value) for value in values]
    names = [name for name, _ in pairs if name]
    if not names:
        return [model for _, model in pairs]
    if len(set(names)) < len(names):
        raise InputError("--expert: two experts have the same name")
    from freemerge.recipe.names import named_experts

    return named_experts(pairs)


def _named_model(value: str) -> tuple[str | None, str]:
    match = _NAMED.fullmatch(value)
    return (match[1], match[2]) if match and not os.path.exists(value) else (None, value)


@contextmanager
def _interruptible(out: str):
    """SIGTERM ends a merge like Ctrl-C does; both say how to go on."""

    def terminate(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        note(
            f"interrupted: nothing in {out} was changed; the same command with --resume goes on where this one stopped"
        )
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(plan, as_json: bool) -> None:
    if not isinstance(plan, dict):
        print_json(_plan_facts(plan)) if as_json else _print_one_plan(plan)
        return
    if as_json:
        print_json({"stages": [{"name": name, **_plan_facts(stage)} for name, stage in plan.items()]})
        return
    for name, stage in plan.items():
        typer.echo(f"-- {name or 'result'}\n")
        _print_one_plan(stage)
        typer.echo()


def _plan_facts(plan) -> dict[str, Any]:
    return {**plan.summary(), "rows": plan.rows()}


def _print_one_plan(plan) -> None:
    print_table(plan.rows())
    typer.echo()
    summary = plan.summary()
    for warning in summary.pop("warnings", ()):
        note(f"warning: {warning}")
    _print_summary(summary)


def _print_summary(summary: dict[str, Any]) -> None:
    for key, value in summary.items():
        if isinstance(value, int) and not isinstance(value, bool) and any(word in key for word in _BYTES):
            value = readable_size(value)
        elif isinstance(value, float):
            value = f"{value:.2f}"
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) if len(value) < 6 else f"{len(value)}: {value[0]} ... {value[-1]}"
        if value not in ("", None):
            typer.echo(f"{key.replace('_', ' '):<16}{value}")


def _print_result(result, as_json: bool, quiet: bool) -> None:
    facts = dataclasses.asdict(result)
    if as_json:
        print_json(facts)
        return
    for warning in facts.pop("warnings"):
        note(f"warning: {warning}")
    if not quiet:
        _print_summary(facts)
