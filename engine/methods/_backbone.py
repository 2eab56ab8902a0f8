"""The merged backbone of FR- and FREE-Merging: high-pass filtered task vectors, summed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from freemerge.kernels.add_elected import add_elected
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, empty, numel, task_vector
from freemerge.kernels.high_pass import HighPassPlan, high_pass, plan_high_pass
from freemerge.kernels.high_pass_magnitudes import high_pass_magnitudes
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.methods import PerExpert, TensorPlan, matches
from freemerge.methods._coefficients import coefficients, per_expert

# What a filter would almost erase, one side being many times the other (METHODS 1.1), or what belongs to one task
EMBEDDINGS_AND_HEADS = (
    "embed",
    r"(^|\.)(wte|wpe|shared|lm_head|head|heads|classifier|score|cls)\.",
    r"^output\.weight$",
)
ELECTED_RUN = 1 << 20  # elements elected at a time where nothing is filtered: bounds the task vectors held in memory
ADDITION = 0.5  # nanoseconds an element and input, of one core: converting, adding, rounding


@dataclass(slots=True)  # not frozen: one is made for every tensor, and a frozen one takes three times as long to make
class Backbone:
    """The parameters that fr and free share; see fr.merge_tensor."""

    weight: PerExpert
    scaling: float
    cutoff: float
    radius_from: str
    inner_ring: str
    align: bool
    elect: bool
    normalize: bool
    include: Sequence[str]
    exclude: Sequence[str]
    filter: Sequence[str]
    unfiltered: Sequence[str]
    bias_rule: str
    coefficient: str = "once"

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Backbone":
        return cls(**{name: parameters[name] for name in _FIELDS if name in parameters})

    def covers(self, name: str) -> bool:
        return (not self.include or matches(name, self.include)) and not matches(name, self.exclude)

    def filters(self, name: str, shape: tuple[int, ...]) -> bool:
        # 1-D tensors have "weight" in their names too, and the official transform cannot take them
        return len(shape) == 2 and 0 not in shape and matches(name, self.filter) and not matches(name, self.unfiltered)

    def copies(self, name: str, shape: tuple[int, ...]) -> bool:
        return not self.covers(name) or (self.bias_rule == "base" and not self.filters(name, shape))

    def merge(self, base: Array, experts: Sequence[Array | None], name: str, out: Array) -> None:
        if self.copies(name, base.shape) or all(expert is None for expert in experts):
            return add_task_vectors(base, [], [], out=out)
        filtered = self.filters(name, base.shape)
        weights = per_expert(self.weight, len(experts))
        weights = [weight for weight, expert in zip(weights, experts, strict=True) if expert is not None]
        experts = [expert for expert in experts if expert is not None]
        ratios = align_ratios(self.magnitudes(base, experts, filtered)) if self.align else [1.0] * len(experts)
        if self.bias_rule == "first" and not filtered:
            weights, ratios, experts = weights[:1], ratios[:1], experts[:1]
        scaling = self.scaling**2 if self.coefficient == "vit8" and filtered else self.scaling
        if self.elect:
            for run, vectors in self._task_vectors(base, experts, ratios, filtered):
                start, target = base.reshape(-1)[run], out.reshape(-1)[run]
                add_elected(start, vectors, weights, scaling=scaling, normalize=self.normalize, out=target)
            return None
        numbers = [c * ratio for c, ratio in zip(coefficients(weights, scaling, self.normalize), ratios, strict=True)]
        if filtered:
            return high_pass(base, experts, numbers, **self._mask, out=out)
        return add_task_vectors(base, experts, numbers, out=out)

    def plan(self, name: str, shape: tuple[int, ...], experts: int) -> TensorPlan:
        if self.copies(name, shape):
            return TensorPlan("copy", elementwise=True)
        size = math.prod(shape)
        addition = ADDITION * size * (experts + 1)
        if not self.filters(name, shape):
            count = "first expert" if self.bias_rule == "first" else "sum"
            workspace = 4 * experts * min(size, ELECTED_RUN) if self.elect else 0
            cost = addition * (2 if self.align else 1)
            return TensorPlan("merge", f"{count}, unfiltered", workspace, cost, elementwise=not self.align)
        transform, described = _transform(shape, **self._mask)
        workspace = transform.workspace + (4 * experts * size if self.elect else 0)
        transforms = (experts if self.elect else 1) + (experts if self.align else 0)
        return TensorPlan("merge", described, workspace, transforms * transform.nanoseconds)

    def magnitudes(self, base: Array, experts: Sequence[Array], filtered: bool) -> list[float]:
        """Mean magnitude of each task vector, of the filtered one where it is filtered; 0 for an empty tensor."""
        if numel(base) == 0:
            return [0.0] * len(experts)
        if filtered:
            sums = high_pass_magnitudes(base, experts, **self._mask)
        else:
            sums = task_vector_statistics(base, experts).sum_abs
        return [float(total) / numel(base) for total in sums]

    @property
    def _mask(self) -> dict[str, Any]:
        return {"cutoff": self.cutoff, "radius_from": self.radius_from, "inner_ring": self.inner_ring}

    def _task_vectors(
        self, base: Array, experts: Sequence[Array], ratios: Sequence[float], filtered: bool
    ) -> Iterator[tuple[slice, list[Array]]]:
        # runs of the flattened tensor with their float32, aligned task vectors; a filtered tensor is one run
        if filtered:
            vectors = [empty(base.shape, np.dtype(np.float32), base) for _ in experts]
            for expert, ratio, vector in zip(experts, ratios, vectors, strict=True):
                high_pass(base, [expert], [ratio], **self._mask, add_base=False, out=vector)
            yield slice(0, numel(base)), [vector.reshape(-1) for vector in vectors]
            return
        flat, pairs = base.reshape(-1), [*zip(experts, ratios, strict=True)]
        for begin in range(0, numel(base), ELECTED_RUN):
            run = slice(begin, min(begin + ELECTED_RUN, numel(base)))
            yield run, [task_vector(flat[run], expert.reshape(-1)[run]) * float(ratio) for expert, ratio in pairs]


_FIELDS = tuple(field.name for field in fields(Backbone))


@lru_cache(maxsize=1024)  # models have few shapes, and a sweep plans them again for each of its merges
def _transform(shape: tuple[int, ...], **mask) -> tuple[HighPassPlan, str]:
    plan = plan_high_pass(shape, **mask)
    return plan, plan.describe()


def align_ratios(magnitudes: Sequence[float]) -> list[float]:
    """What scales each expert up to the largest mean magnitude; 1 for an expert that does not move (METHODS 1.3)."""
    largest = max(magnitudes, default=0.0)
    return [largest / magnitude if magnitude else 1.0 for magnitude in magnitudes]


def fit_expert(name: str, shape: tuple[int, ...], expert_shape: tuple[int, ...], *, crop: bool, **_) -> str | None:
    """The official llm code's rule for an expert's tensor of another shape, on request (METHODS section 0)."""
    if not crop:
        return None
    vocabulary = matches(name, ("lm_head", "embed_tokens")) and len(shape) == len(expert_shape) == 2
    covers = vocabulary and all(theirs >= ours for ours, theirs in zip(shape, expert_shape, strict=True))
    return "crop" if covers else "skip"
