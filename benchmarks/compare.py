"""Whole merges against the floor (the time the bytes take to move), mergekit, and the official filter chain.

    python benchmarks/compare.py                               everything: two hours on 2 cores, 20 GB of disk
    python benchmarks/compare.py --only fr,free --repeats 5    some rows
    python benchmarks/compare.py --only ties,della,mergekit    some rows, of mergekit too
    python benchmarks/compare.py --size 0.25                   a model of a quarter of the size

The floor and then a command, one at a time, warm page cache, in rounds over all commands; a result is the median of the
rounds. Rows are appended to benchmarks/results/compare.csv when they are complete; the tables of this run go to the
terminal and to benchmarks/results/latest.md.
"""

import argparse
import datetime
import sys
from collections import defaultdict
from pathlib import Path

import bars
import growth
import machine
import peers
import processes
import results
import synthetic
from commands import default_freemerge, experts_of, merge_command, mergekit_recipe, recipe_command
from merges import MERGES
from session import Session, gigabytes, say

PARTS = ("startup", *MERGES, "durable", "mergekit", "official", "growth")
DURABLE = ("task_arithmetic", "fr", "free")


def measure_startup(session: Session) -> None:
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {what: [session.options.freemerge, what] for what in ("--help", "methods")}
    for _ in range(max(7, session.options.repeats)):
        for what, command in commands.items():
            session.attempt(what, lambda command=command: processes.run(command))
    for what in commands:
        session.keep(what, notes="start-up")


def measure_merges(session: Session, model: synthetic.Checkpoints, names: list[str]) -> None:
    options = session.options
    mergekit = peers.install(options.data / "mergekit") if "mergekit" in options.only else None
    peer_names = [name for name in names or MERGES if MERGES[name].mergekit] if mergekit else []
    durable = [name for name in names if name in DURABLE and "durable" in options.only]
    for number in range(options.repeats):
        say(f"round {number + 1} of {options.repeats}")
        for name in names:
            session.time_merge(name, freemerge_command(options, name, model, session.out), name, model)
        for name in durable:
            command = merge_command(options.freemerge, name, model, session.out, fsync=True)
            session.time_merge(f"{name}, fsync", command, name, model, fsync=True)
        for name in peer_names if number < options.mergekit_repeats else ():
            command = peers.command(mergekit, mergekit_recipe(name, model, options.data), session.out)
            session.time_merge(f"mergekit {name}", command, name, model)
    mergekit_notes = f"mergekit {peers.VERSION}, the same recipe file, {' '.join(peers.OPTIONS)}"
    for name in names:
        keep_merge(session, name, name, model, "")
        keep_merge(session, f"{name}, fsync", name, model, "floor with fsync")
    for name in peer_names:
        keep_merge(session, f"mergekit {name}", name, model, mergekit_notes)


def freemerge_command(options: argparse.Namespace, name: str, model: synthetic.Checkpoints, out: Path) -> list:
    """Where mergekit has the method, freemerge is given the very file that mergekit is given."""
    if MERGES[name].mergekit:
        return recipe_command(options.freemerge, mergekit_recipe(name, model, options.data), out)
    return merge_command(options.freemerge, name, model, out)


def keep_merge(session: Session, what: str, name: str, model: synthetic.Checkpoints, notes: str) -> None:
    experts, moved = len(experts_of(name, model)), gigabytes(model, name)
    session.keep(what, size=session.options.size, experts=experts, gigabytes=moved, notes=notes)


def measure_official(session: Session, model: synthetic.Checkpoints) -> None:
    """Time the official chains on one tensor of each shape of the layers; multiply by the elements of that shape."""
    import official_chain  # torch: only here

    elements: dict[tuple[int, ...], int] = defaultdict(int)
    for name, shape in model.llama.tensors().items():
        if len(shape) == 2 and ".layers." in name:
            elements[shape] += shape[0] * shape[1]
    totals: dict[str, float] = defaultdict(float)
    for shape, count in elements.items():
        found = official_chain.seconds_per_element(shape, len(model.experts), session.options.repeats)
        for chain, seconds in found.items():
            totals[chain] += seconds * count
            say(f"  official {chain}, {shape[0]} x {shape[1]}: {seconds * 1e9:.0f} ns an element")
    share = sum(elements.values()) / model.llama.parameters()
    notes = f"EXTRAPOLATED: one tensor of each shape, medians of {session.options.repeats}; only the layers' matrices"
    for chain, seconds in totals.items():
        session.estimates[f"official {chain}"] = seconds
        scope = f"({share:.0%} of the parameters), no files"
        session.keep(
            f"official {chain}", size=session.options.size, experts=len(model.experts), notes=f"{notes} {scope}"
        )


def report(session: Session) -> str:
    where = machine.describe()
    head = (
        f"{datetime.date.today()}, {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; "
        f"{machine.versions()}. "
        "Whole processes, warm page cache, medians; printed by `make bench` (benchmarks/compare.py)."
    )
    judged = bars.judge(session.seconds(), session.floor(), session.peaks())
    shown = ("what", "size", "experts", "gigabytes", "seconds", "floor", "times_floor", "peak_mib", "repeats", "notes")
    tables = [
        results.table(("what", "bar", "measured", "verdict"), judged),
        results.table(shown, ([getattr(row, column) for column in shown] for row in session.rows)),
        *growth.growth_tables(session),
    ]
    return "\n\n".join([head, *tables, *(f"FAILED {what}: {why}" for what, why in session.failures.items())]) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--mergekit-repeats", type=int, default=1, help="rounds with mergekit in them (default 1)")
    parser.add_argument("--size", type=float, default=1.0, help="of the 1.1 billion parameters (default 1)")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("bench-data"), help="where the models are kept (bench-data)")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="where rows and tables go"
    )
    parser.add_argument("--freemerge", type=Path, default=default_freemerge(), help="the command to time")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.data = options.data.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.data.mkdir(parents=True, exist_ok=True)
    session = Session(options)
    names = [name for name in MERGES if name in options.only]
    if "startup" in options.only:
        measure_startup(session)
    if names or {"mergekit", "official"} & set(options.only):
        model = session.prepare(options.size, options.experts)
        if names or "mergekit" in options.only:
            measure_merges(session, model, names)
        if "official" in options.only:
            measure_official(session, model)
    if "growth" in options.only:
        growth.measure_growth(session)
    text = report(session)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "latest.md").write_text(text)
    print(text)
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
