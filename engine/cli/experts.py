"""freemerge experts: the experts beside a merged model, and fine-tunes as adapters."""

import os
from dataclasses import asdict
from pathlib import Path

import typer

from freemerge.cli.arguments import PARAMETER, parse_parameters
from freemerge.cli.output import print_json, print_table, progress_bar
from freemerge.errors import InputError
from freemerge.sizes import readable_size

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, apply, compact, join, export or extract the experts of a model.",
)


@app.command("list")
def list_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with experts."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the experts of a merged model, and its router.

    Example: freemerge experts list merged
    """
    from freemerge.experts.apply import list_experts, share_of_experts

    experts = [asdict(expert) for expert in list_experts(merged)]
    if as_json:
        print_json(experts)
        return
    print_table(experts)
    nbytes, share = share_of_experts(merged)
    typer.echo(f"together {readable_size(nbytes)}, {share:.2%} of the dense model")
    _print_router(Path(merged))


def _print_router(merged: Path) -> None:
    from freemerge.routers.files import find_router, load_router

    if find_router(merged) is None:
        return
    router = load_router(merged)
    picks = {1: "picks one expert", None: "weighs all experts"}.get(router.top_k, f"weighs {router.top_k} experts")
    alone = f", the backbone alone below a confidence of {router.threshold:.3g}" if router.threshold else ""
    typer.echo(f"router: {router.kind}, {picks}{alone}")


@app.command("apply")
def apply_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with experts."),
    experts: str = typer.Argument(
        ..., help="An expert, as `freemerge experts list` names it, or several with weights: math=0.7,code=0.3."
    ),
    out: str = typer.Argument(..., metavar="OUT", help="The folder to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in OUT, once the result is complete."),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Write a plain checkpoint: the merged model with one expert in it, or with a weighted sum of several.

    Example: freemerge experts apply merged math merged-math
    """
    from freemerge.experts.apply import apply_expert

    apply_expert(merged, _weights(experts), out, overwrite=overwrite, fsync=not no_fsync)
    typer.echo(f"{out}: {merged} with the expert {experts}")


@app.command("compact")
def compact_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with experts."),
    out: str = typer.Argument(..., metavar="OUT", help="The folder to write."),
    values: str = typer.Option("int8", metavar="int8|float8", help="The dtype of values; float8 is e4m3."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in OUT, once the result is complete."),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Write the merged model with experts of half the size: values in 8 bits with a scale for each row.

    Prints the error that this makes, in all sparse rows of an expert and in the worst of its tensors.

    Example: freemerge experts compact merged merged-compact
    """
    from freemerge.experts.compact import compact_experts

    experts = compact_experts(merged, out, values=values, overwrite=overwrite, fsync=not no_fsync)
    if as_json:
        print_json([asdict(expert) for expert in experts])
        return
    print_table(asdict(expert) for expert in experts)
    before, after = (sum(getattr(e, key) for e in experts) for key in ("nbytes_before", "nbytes"))
    typer.echo(f"{out}: {merged} with experts of {readable_size(after)} instead of {readable_size(before)}")


@app.command("join")
def join_command(
    adapters: list[str] = typer.Argument(..., metavar="ADAPTER[=WEIGHT]...", help="LoRA adapters; the weight is 1."),
    out: str = typer.Option(..., "--out", "-o", help="The folder to write the adapter to."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in OUT, once the result is complete."),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Write one LoRA adapter that does what the weighted sum of several does, exactly: their ranks add up.

    Example: freemerge experts join math-lora=0.7 code-lora=0.3 -o both-lora
    """
    from freemerge.experts.join import join_adapters

    ranks = join_adapters(_weighted(adapters), out, overwrite=overwrite, fsync=not no_fsync)
    typer.echo(f"{out}: an adapter of {len(ranks)} modules, of rank {max(ranks.values())} at most")


def _weighted(adapters: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in adapters:
        weights |= {item: 1.0} if os.path.exists(item) else _weights(item)
    return weights


def _weights(experts: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in experts.split(","):
        name, given, weight = item.rpartition("=")
        name = name if given else item
        try:
            number = float(weight) if given else 1.0
        except ValueError:
            raise InputError(
                f"{item!r} is not NAME=WEIGHT with a number; give math=0.7,code=0.3, or one name"
            ) from None
        if name in weights:
            raise InputError(f"{name} is given twice")
        weights[name] = number
    return weights


@app.command("export")
def export_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge with experts."),
    name: str = typer.Argument(..., help="The expert, as `freemerge experts list` names it."),
    out: str = typer.Argument(..., metavar="OUT", help="The folder to write the adapter to."),
    lora: int = typer.Option(..., metavar="RANK", help="The adapter's rank."),
    only_linear: bool = typer.Option(False, "--only-linear", help="Leave out all but low-rank updates, as for vLLM."),
    leave_out: bool = typer.Option(False, "--leave-out", help="Do without changes no adapter can hold."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in OUT, once the result is complete."),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Write an expert as a LoRA adapter for PEFT on the merged model: its truncated singular value decomposition.

    The error of each tensor, and of the whole expert, is what the rank leaves away.

    Example: freemerge experts export merged math math-lora --lora 64
    """
    from freemerge.experts.export import export_adapter

    options = {"leave_out": leave_out, "only_linear": only_linear, "overwrite": overwrite, "fsync": not no_fsync}
    with progress_bar("exporting", quiet=as_json) as progress:
        rows = export_adapter(merged, name, out, rank=lora, progress=progress, **options)
    _print_adapter(rows, out, lora, f"the expert {name} as a LoRA adapter of rank {lora} on {merged}", as_json)


@app.command("extract")
def extract_command(
    merged: str = typer.Argument(..., help="A folder written by freemerge merge, by any method; with --lora the base."),
    model: str = typer.Argument(..., help="The fine-tuned model: folder, file or hub name."),
    out: str = typer.Argument(None, metavar="[OUT]", help="With --lora: the folder to write the adapter to."),
    lora: int = typer.Option(None, metavar="RANK", help="Write a PEFT LoRA adapter of this rank instead."),
    leave_out: bool = typer.Option(False, "--leave-out", help="With --lora: do without changes no adapter can hold."),
    as_json: bool = typer.Option(False, "--json", help="With --lora: print JSON."),
    name: str = typer.Option(None, help="What to call the expert [default: the last part of the model's path]."),
    parameter: list[str] = PARAMETER,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an expert of this name, or OUT."),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Read .bin and .pt files too (torch, weights only)."
    ),
    no_fsync: bool = typer.Option(False, "--no-fsync", help="Do not wait for the disk."),
) -> None:
    """Put one more expert beside a merged model: the sparse part of a fine-tuned model, cut out as free does.

    With --lora, write a LoRA adapter for PEFT: the truncated singular value decomposition of what fine-tuning changed.

    freemerge experts extract merged runs/law -p density=0.02
    freemerge experts extract --lora 16 llama runs/law law-lora
    """
    options = {"overwrite": overwrite, "allow_pickle": allow_pickle, "fsync": not no_fsync}
    if lora is not None:
        if out is None or name is not None or parameter:
            raise InputError("--lora takes BASE MODEL OUT, and neither --name nor -p; see --help")
        _extract_adapter(merged, model, out, lora, leave_out, as_json, options)
        return
    if out is not None or leave_out or as_json:
        raise InputError("OUT, --leave-out and --json go with --lora RANK; see --help")
    from freemerge.experts.from_model import extract_expert

    typer.echo(extract_expert(merged, model, name=name, **options, **parse_parameters(parameter)))


def _extract_adapter(base: str, model: str, out: str, rank: int, leave_out: bool, as_json: bool, options: dict) -> None:
    from freemerge.experts.lora import extract_adapter

    with progress_bar("extracting", quiet=as_json) as progress:
        rows = extract_adapter(base, model, out, rank=rank, leave_out=leave_out, progress=progress, **options)
    _print_adapter(rows, out, rank, f"{model} as a LoRA adapter of rank {rank} on {base}", as_json)


def _print_adapter(rows: list, out: str, rank: int, said: str, as_json: bool) -> None:
    from freemerge.experts.lora import total_error

    tensors, error = [asdict(row) for row in rows], total_error(rows)
    if as_json:
        print_json({"out": out, "rank": rank, "error": error, "tensors": tensors})
        return
    print_table(tensors)
    typer.echo(f"{out}: {said}, error {error:.3g}")
