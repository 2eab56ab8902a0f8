"""Merge real fine-tuned models in about a minute: `make demo`, or `python examples/digits.py`.

A small vision transformer learns what handwritten digits look like (scikit-learn's 1797 real ones) by filling in hidden
patches. Four experts are fine-tuned from it, each on a task of its own. The freemerge command line then merges them by
four methods, and every model is measured on every task, on images that none of them was trained on.

As in the literature on merging vision models, only the encoder is fine-tuned and merged. A task reads its features
through a linear head, fitted once on the base's features and frozen: it is the same for every model in the table.

Seeds are fixed; the last digits of the numbers may still differ between processors.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from digits_training import (
    TASKS,
    Digits,
    Encoder,
    accuracy,
    fine_tune,
    fit_head,
    load_encoder,
    save_encoder,
    train_base,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from freemerge.inspect import inspect_models

METHODS = {
    "average": [],
    "task_arithmetic": ["-p", "scaling=0.3"],
    "fr": ["-p", "scaling=0.3"],
    "free": ["-p", "scaling=0.3", "-p", "density=0.01"],
}
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    options = arguments()
    started = time.perf_counter()
    shutil.rmtree(options.out, ignore_errors=True)
    digits = Digits.load()
    heads = train(digits, options.out, options.steps)
    seconds = {method: merge(options.out, method, parameters) for method, parameters in METHODS.items()}
    apply_experts(options.out)
    console.print(accuracies(digits, heads, options.out, seconds))
    draw(options.out)
    console.print(f"{time.perf_counter() - started:.0f} s in all. The picture is {options.out / 'spectra.png'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="the folder to write, replaced if it exists [demo]"
    )
    parser.add_argument(
        "--steps", type=int, default=700, help="training steps of the base; an expert takes 3 for its 7 [700]"
    )
    return parser.parse_args()


def train(digits: Digits, out: Path, steps: int) -> dict[str, torch.nn.Linear]:
    """Write the base and an expert for each task, and answer the heads."""
    # Such small matrices gain nothing from threads within an operation; experts train beside each other instead.
    torch.set_num_threads(1)
    console.print("training the base, then an expert for each task")
    base = train_base(digits.train[0], steps=steps)
    save_encoder(base, out / "base", max_shard_size="150KB")
    heads = {name: fit_head(base, task, *digits.train) for name, task in TASKS.items()}

    def train_expert(name: str) -> None:
        expert = fine_tune(base, heads[name], TASKS[name], *digits.train, steps=3 * steps // 7)
        save_encoder(expert, out / "experts" / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train_expert, TASKS))
    return heads


def merge(out: Path, method: str, parameters: list[str]) -> float:
    """Seconds of the whole command."""
    experts = [text for name in TASKS for text in ("--expert", f"{name}={out / 'experts' / name}")]
    started = time.perf_counter()
    freemerge(
        "merge",
        "--method",
        method,
        "--base",
        out / "base",
        *experts,
        *parameters,
        "-o",
        out / "merged" / method,
        "--quiet",
    )
    return time.perf_counter() - started


def apply_experts(out: Path) -> None:
    for name in TASKS:
        freemerge("experts", "apply", out / "merged" / "free", name, out / "applied" / name)


def freemerge(*arguments: str | Path) -> None:
    """Run the command line of this Python, and show what is run."""
    command = ["freemerge", *map(str, arguments)]
    console.print("$", " ".join(command), style="dim")
    # the script beside this interpreter, whether or not its environment is active
    program = Path(sys.executable).with_name("freemerge")
    subprocess.run([program, *command[1:]], check=True, stdout=subprocess.DEVNULL)


def accuracies(digits: Digits, heads: dict[str, torch.nn.Linear], out: Path, seconds: dict[str, float]) -> Table:
    def row(label: str, encoders: dict[str, Encoder], time: float | None = None) -> list[str]:
        values = [accuracy(encoders[name], heads[name], task, *digits.test) for name, task in TASKS.items()]
        return [
            label,
            *(f"{value:.1f}" for value in values),
            f"{sum(values) / len(values):.1f}",
            f"{time:.2f} s" if time else "",
        ]

    def same(folder: Path) -> dict[str, Encoder]:
        return dict.fromkeys(TASKS, load_encoder(folder))

    def own(folder: Path) -> dict[str, Encoder]:
        return {name: load_encoder(folder / name) for name in TASKS}

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"accuracy in % on {len(digits.test[0])} unseen images")
    for heading in ("model", *TASKS, "mean", "command"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    table.add_row(*row("base", same(out / "base")))
    table.add_row(*row("experts, own task", own(out / "experts")), end_section=True)
    for method in METHODS:
        table.add_row(
            *row("free, backbone" if method == "free" else method, same(out / "merged" / method), seconds[method])
        )
    table.add_row(*row("free, with experts", own(out / "applied")))
    return table


def draw(out: Path) -> None:
    experts = [str(out / "experts" / name) for name in TASKS]
    inspect_models(experts, str(out / "base"), spectrum=out / "spectra.png")


if __name__ == "__main__":
    main()
