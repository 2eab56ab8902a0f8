"""freemerge methods: which there are, and what each takes."""

from dataclasses import asdict

import typer

from freemerge.cli.output import print_json, print_table


def command(
    name: str = typer.Argument(None, metavar="NAME", help="A method; without it, all are listed."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    markdown: bool = typer.Option(False, "--markdown", help="Print the reference of all methods, docs/methods.md."),
) -> None:
    """List the merge methods, or describe one: parameters, defaults, variants, paper.

    Example: freemerge methods free
    """
    from freemerge import methods

    if markdown:
        from freemerge import reference

        typer.echo(reference.page(), nl=False)
        return
    if name is None:
        print_json(methods.summaries()) if as_json else print_list()
        return
    method = methods.get(name)
    if as_json:
        print_json(_described(method))
    else:
        _print(method)


def print_list() -> None:
    from freemerge import methods

    print_table({"method": name, "what it does": summary} for name, summary in methods.summaries().items())


def _described(method) -> dict:
    return {
        "name": method.name,
        "summary": method.summary,
        "scope": method.scope,
        "source": method.source,
        "uses_base": method.uses_base,
        "writes_experts": method.writes_experts,
        "variants": {name: dict(presets) for name, presets in method.variants.items()},
        "aliases": dict(method.aliases),
        "parameters": [asdict(parameter) for parameter in method.parameters.values()],
    }


def _print(method) -> None:
    from freemerge import reference

    typer.echo(f"{method.name}: {method.summary}")
    typer.echo(f"source   {method.source}")
    typer.echo(f"scope    {method.scope}: {_SCOPES[method.scope]}")
    typer.echo(f"needs    {reference.needs(method)}")
    if method.writes_experts:
        typer.echo("writes   the backbone and, beside it, one expert for each model (freemerge experts)")
    for alias, parameter in method.aliases.items():
        typer.echo(f"alias    {alias}: {parameter}")
    typer.echo(f"\n{reference.notes(method)}")
    typer.echo("\nparameters (-p name=value)")
    for parameter in method.parameters.values():
        typer.echo(f"  {parameter.name} = {_value(parameter.default)}   {_kind(parameter)}")
        typer.echo(_wrapped(parameter.help))
    if method.variants:
        typer.echo("\nvariants (-p variant=name): presets that parameters given beside them override")
        for name, presets in method.variants.items():
            typer.echo(f"  {name}")
            typer.echo(_wrapped(", ".join(f"{key}={_value(value)}" for key, value in presets.items())))


_SCOPES = {
    "element": "any run of elements is merged on its own",
    "tensor": "a tensor is merged as a whole",
    "model": "all tensors are measured before the first is merged",
}


def _kind(parameter) -> str:
    word = {"number-or-choice": "number or ", "choice": ""}.get(parameter.kind, parameter.kind)
    text = word + " | ".join(map(str, parameter.choices))
    return f"{text}, one for each expert" if parameter.per_expert else text


def _value(value) -> str:
    if value is None:
        return "(depends)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100, initial_indent="      ", subsequent_indent="      ", break_long_words=False)
