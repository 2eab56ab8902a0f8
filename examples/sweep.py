"""Search for the best merge of three experts, in seconds: `python examples/sweep.py`.

A freemerge.Session holds a small vision transformer and three experts fine-tuned from it on tasks of scikit-learn's
handwritten digits, and merges them straight into a live model, which is measured at once: first over a grid of fr's
scaling and cutoff, then by an evolution strategy that looks for a weight for each expert. Merges are chosen by one half
of the unseen images; the accuracies printed last are those on the other half.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from digits_training import Digits, Encoder, accuracy, below_five, fine_tune, fit_head, inverted, parity, train_base
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import freemerge

TASKS = {task.__name__: task for task in (parity, below_five, inverted)}
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5)
CUTOFFS = (0.3, 0.5, 0.7)
OFFSPRING = 4  # of each generation
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)  # such small matrices gain nothing from more; experts train beside each other instead
    digits = Digits.load()
    console.print("training the base, then an expert for each task")
    base = train_base(digits.train[0], steps=options.steps)
    heads = {name: fit_head(base, task, *digits.train) for name, task in TASKS.items()}

    def train_expert(name: str) -> Encoder:
        return fine_tune(base, heads[name], TASKS[name], *digits.train, steps=3 * options.steps // 7)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        experts = dict(zip(TASKS, pool.map(train_expert, TASKS), strict=True))
    with freemerge.Session(base, experts, device="cpu") as session:
        search = Search(session, heads, digits)
        search.grid()
        weights = search.evolve(options.generations)
        console.print(search.summary(weights))
        milliseconds = 1e3 * search.seconds / search.merges
        console.print(f"{search.merges} merges in {search.seconds:.2f} s, {milliseconds:.1f} ms each")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=280, help="training steps of the base; an expert takes 3 for its 7 [280]"
    )
    parser.add_argument("--generations", type=int, default=12, help=f"of {OFFSPRING} merges each [12]")
    return parser.parse_args()


class Search:
    """Merges into one live model, and how good each was."""

    def __init__(self, session: freemerge.Session, heads: dict[str, torch.nn.Linear], digits: Digits):
        self.session, self.heads, self.model = session, heads, Encoder()
        images, labels = digits.test
        half = len(images) // 2
        self.chosen_on, self.reported_on = (images[:half], labels[:half]), (images[half:], labels[half:])
        self.merges, self.seconds = 0, 0.0

    def accuracies(self, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
        return [accuracy(self.model, self.heads[name], task, images, labels) for name, task in TASKS.items()]

    def merge(self, method: str, **parameters) -> float:
        """Merge into the model; the mean accuracy it is chosen by."""
        started = time.perf_counter()
        self.session.merge(method, into=self.model, **parameters)
        self.seconds += time.perf_counter() - started
        self.merges += 1
        return sum(self.accuracies(*self.chosen_on)) / len(TASKS)

    def grid(self) -> None:
        table = Table(box=SIMPLE_HEAD, title="fr: mean accuracy in %, by cutoff and scaling")
        for heading in ("", *map(str, SCALINGS)):
            table.add_column(heading, justify="right")
        for cutoff in CUTOFFS:
            row = [self.merge("fr", scaling=scaling, cutoff=cutoff) for scaling in SCALINGS]
            table.add_row(str(cutoff), *(f"{value:.1f}" for value in row))
        console.print(table)

    def evolve(self, generations: int) -> list[float]:
        """A (1 + OFFSPRING) evolution strategy: steps grow after a success and shrink after a failure."""
        random = torch.Generator().manual_seed(0)
        best, step = torch.full((len(TASKS),), 0.3), 0.2
        score = self.merge("task_arithmetic", weight=best.tolist())
        for _ in range(generations):
            children = best + step * torch.randn((OFFSPRING, len(TASKS)), generator=random)
            scores = [self.merge("task_arithmetic", weight=child.tolist()) for child in children]
            if max(scores) > score:
                score, step = max(scores), 1.5 * step
                best = children[scores.index(score)]
            else:
                step *= 0.7
        return best.tolist()

    def summary(self, weights: list[float]) -> Table:
        table = Table(box=SIMPLE_HEAD, title=f"accuracy in % on {len(self.reported_on[0])} other images")
        for heading in ("task_arithmetic", *TASKS, "mean"):
            table.add_column(heading, justify="left" if heading == "task_arithmetic" else "right")
        found = ", ".join(f"{weight:.2f}" for weight in weights)
        for label, weight in (("weight 0.3 for all", 0.3), (found, weights)):
            self.merge("task_arithmetic", weight=weight)
            values = self.accuracies(*self.reported_on)
            table.add_row(label, *(f"{value:.1f}" for value in (*values, sum(values) / len(values))))
        return table


if __name__ == "__main__":
    main()
