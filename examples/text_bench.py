"""The measuring half of text.py: merged models alone, with each task's expert, and with routed experts."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from text_training import Task, Texts, accuracy, features, load_encoder, percent_right
from torch import Tensor, nn

import freemerge
from freemerge.experts.compact import compact_experts
from freemerge.routers import MlpRouter


@dataclass(frozen=True)
class Bench:
    """The tasks, and the folder of the models."""

    out: Path
    tasks: list[Task]

    @cached_property
    def mixture(self) -> Texts:
        """The test texts of all tasks."""
        return Texts.mixture([task.test for task in self.tasks])

    def of_each(self, found: Tensor) -> list[float]:
        """Percent right of each task, by the features of the mixture."""
        whose, labels = self.mixture.labels.T
        return [percent_right(found[whose == i], task, labels[whose == i]) for i, task in enumerate(self.tasks)]

    def merge(self, method: str, parameters: dict) -> nn.Module:
        """The merged model, with its experts if it has any; `values` of the parameters is that of compact_experts."""
        merged, experts = self.out / "merged" / method, {task.name: self.expert(task.name) for task in self.tasks}
        its = {name: value for name, value in parameters.items() if name != "values"}
        base = self.out / "base"
        freemerge.merge(method, base=base, experts=experts, out=merged, overwrite=True, fsync=False, **its)
        if "values" in parameters:
            compact_experts(merged, merged, values=parameters["values"], overwrite=True, fsync=False)
        model = load_encoder(merged)
        return freemerge.attach(model, merged) if (merged / "experts").exists() else model

    def expert(self, name: str) -> Path:
        return self.out / "experts" / name

    def expert_bytes(self, method: str) -> tuple[float, int]:
        """Of an expert's file, and of what all experts share beside the backbone."""
        folder = self.out / "merged" / method / "experts"
        shared = sum(path.stat().st_size for path in folder.glob("shared/*.safetensors"))
        return statistics.fmean(path.stat().st_size for path in folder.glob("*.safetensors")), shared


@dataclass(frozen=True)
class Measured:
    """A merged model: percent right of each task, alone, and if there are experts with each task's own and routed."""

    alone: list[float]
    own: list[float] | None = None
    routed: list[float] | None = None
    nbytes: float | None = None  # of an expert
    shared: int = 0  # bytes that all experts share
    right: float | None = None  # percent of the texts for which the router picks the task's own expert
    seconds: dict[str, float] | None = None


def measure(bench: Bench, method: str, parameters: dict) -> Measured:
    model = bench.merge(method, parameters)
    found = features(model, bench.mixture)
    alone = bench.of_each(found)
    if not hasattr(model, "experts"):
        return Measured(alone)
    router, own = fit_router(bench, model), own_experts(bench, model)
    accuracies, right = routed(bench, model, router, found)
    return Measured(alone, own, accuracies, *bench.expert_bytes(method), right, speeds(bench, model, router))


def measure_size(bench: Bench, method: str, parameters: dict) -> tuple[float, float]:
    """Bytes of an expert, and mean accuracy with each task's own."""
    own = own_experts(bench, bench.merge(method, parameters))
    return bench.expert_bytes(method)[0], statistics.fmean(own)


def validated(bench: Bench, method: str, parameters: dict) -> float:
    """Mean accuracy on the validation texts, each task with its expert if there are experts."""
    model = bench.merge(method, parameters)
    use = getattr(model, "use_expert", lambda name: None)
    found = []
    for task in bench.tasks:
        use(task.name)
        found.append(accuracy(model, task, task.validation))
    return statistics.fmean(found)


def own_experts(bench: Bench, model: nn.Module) -> list[float]:
    """Percent right of each task with its expert in place."""
    found = []
    for task in bench.tasks:
        model.use_expert(task.name)
        found.append(accuracy(model, task, task.test))
    model.use_expert(None)
    return found


def fit_router(bench: Bench, model: nn.Module) -> MlpRouter:
    """By the features that the backbone alone has of some of the training texts."""
    return MlpRouter.fit({task.name: features(model, task.train.every(3)) for task in bench.tasks})


def routed(bench: Bench, model: nn.Module, router: MlpRouter, found: Tensor) -> tuple[list[float], float]:
    """Percent right of each task with the experts that the router picks, and how many of them are the task's own.

    Batches are of texts of all tasks; `found` are their features from the backbone alone.
    """
    picked = router.assign(found)
    own = [bench.tasks[index].name for index in bench.mixture.labels[:, 0]]
    right = 100 * statistics.fmean(a == b for a, b in zip(picked, own, strict=True))
    return bench.of_each(features(model, bench.mixture, lambda rows: model.routed(picked[rows]))), right


@torch.no_grad()
def speeds(bench: Bench, model: nn.Module, router: MlpRouter, rounds: int = 5) -> dict[str, float]:
    """Least seconds of each way to run 32 texts of all tasks, and of putting an expert in another's place."""
    texts = bench.mixture.every(max(1, len(bench.mixture) // 32))
    inputs = texts.inputs(slice(32))
    own = [bench.tasks[index].name for index in texts.labels[:32, 0]]
    first, second = (task.name for task in bench.tasks[:2])

    def forward(around=nullcontext) -> None:
        with around():
            model(**inputs)

    ways = {
        "backbone alone": forward,
        "mixed batch": lambda: forward(lambda: model.routed(own)),
        "with router": lambda: forward(lambda: model.routed(router)),
        "first": lambda: model.use_expert(first),
        "switch": lambda: model.use_expert(second),
        "expert in place": forward,
        "last": lambda: model.use_expert(None),
    }
    found = [{way: seconds(run) for way, run in ways.items()} for _ in range(rounds)]
    return {way: min(times[way] for times in found) for way in ways}


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
