"""The sparse expert of FREE-Merging: which entries it keeps, and the scale they are applied with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, SparseRows, numel, rows_of
from freemerge.kernels.count_magnitudes import allot_ties, count_magnitudes
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.sparse_rows import Selection, sparse_rows
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.methods._backbone import Backbone, align_ratios


@dataclass(slots=True)
class SparseExpert:
    """The expert's parameters of free; see free.merge_tensor."""

    density: float
    removal: float
    selection: str
    relative_to: str
    rescale: float | str
    expert_scaling: float
    combine: str

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "SparseExpert":
        return cls(**{name: parameters[name] for name in _FIELDS})

    def check(self) -> None:
        """Raise RecipeError for shares that are none."""
        for name in ("density", "removal"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise RecipeError(f"{name}: {share} is not a share of the entries; give a number from 0 to 1")

    def ranks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """First and last (exclusive) rank kept, of a row or of the tensor."""
        if shape == () and self.selection == "row":
            return 0, 1  # the official code passes 0-d tensors through
        rows, width = rows_of(shape)
        return self.ranks_of(width if self.selection == "row" else rows * width)

    def ranks_of(self, numel: int) -> tuple[int, int]:
        # products of doubles, cut off: METHODS section 0
        first = int(numel * self.removal)
        return first, min(first + int(numel * self.density), numel)

    def count(self, shape: tuple[int, ...]) -> int:
        rows, width = rows_of(shape)
        if self.selection == "model":
            return rows * width
        first, last = self.ranks(shape)
        return (last - first) * (rows if self.selection == "row" else 1)

    def extract(self, reference: Array, expert: Array, within: Selection | None) -> SparseRows:
        if self.selection == "model":
            return sparse_rows(reference, expert, within=within)
        first, last = self.ranks(expert.shape)
        return sparse_rows(reference, expert, first=first, last=last, scope=self.selection)

    def select(self, references: Sequence[Array], experts: Sequence[Array]) -> list[tuple[Selection, int]]:
        """The thresholds of one expert over all its tensors; for each its share of the ties, and how many it keeps."""
        first, last = self.ranks_of(sum(map(numel, experts)))
        lower, lowest, kept = _threshold(references, experts, last)
        upper, highest, removed = _threshold(references, experts, first)
        counts = [keep - remove for keep, remove in zip(kept, removed, strict=True)]
        return [
            (Selection(lower, low, upper, high), count)
            for low, high, count in zip(lowest, highest, counts, strict=True)
        ]

    def measure(
        self,
        base: Array,
        merged: Array,
        experts: Sequence[Array | None],
        rows: Sequence[SparseRows | None],
        backbone: Backbone,
        name: str,
    ) -> list[dict]:
        present = [t for t, expert in enumerate(experts) if expert is not None]
        result: list[dict] = [{} for _ in experts]
        reference = merged if self.relative_to == "merged" else base
        arrays = [experts[t] for t in present]
        if self.rescale == "weighted" and backbone.covers(name):
            residuals = task_vector_statistics(reference, arrays).sum_abs
            for t, residual in zip(present, residuals, strict=True):
                result[t] = self._statistics(_sum_abs(rows[t]), float(residual), numel(base))
        elif self.rescale == "official":
            # every floating tensor of the checkpoint counts, merged or not, once whatever its size
            magnitudes = backbone.magnitudes(base, arrays, backbone.filters(name, base.shape))
            if backbone.align:
                ratios = align_ratios(magnitudes)
                magnitudes = [magnitude * ratio for magnitude, ratio in zip(magnitudes, ratios, strict=True)]
            for t, magnitude in zip(present, magnitudes, strict=True):
                held = rows[t]
                if held is None and not backbone.covers(name) and self.selection != "model":
                    held = self.extract(reference, experts[t], None)
                result[t] = self._statistics(_sum_abs(held) / max(numel(base), 1), magnitude, 1)
        return result

    def _statistics(self, selected: float, whole: float, elements: int) -> dict[str, float]:
        return {"selected": selected, "whole": whole, "elements": elements, "kept": self.density * elements}

    def scale(self, statistics: Sequence[Mapping[str, float]]) -> float:
        """mu of one expert; METHODS 1.4 (official) and 1.6 (weighted). 1 for an expert with nothing in it."""
        measured = [one for one in statistics if one]
        if not measured:
            return 1.0 if isinstance(self.rescale, str) else float(self.rescale)
        sums = {key: math.fsum(one[key] for one in measured) for key in measured[0]}
        if not (sums["kept"] and sums["whole"]):
            return 1.0
        density = sums["kept"] / sums["elements"]  # a recipe may give tensors different ones
        return -math.log10(density) * (sums["selected"] / density) / sums["whole"]

    def tensor_scale(self, mu: float, filtered: bool, backbone: Backbone) -> float:
        own = mu if isinstance(self.rescale, str) else float(self.rescale)
        if backbone.coefficient == "vit8":
            return self.expert_scaling * backbone.scaling * (own if filtered else 1.0)
        return self.expert_scaling * own


_FIELDS = tuple(field.name for field in fields(SparseExpert))


def _threshold(references: Sequence[Array], experts: Sequence[Array], rank: int) -> tuple[float, list[int], list[int]]:
    """The rank-th largest magnitude; for each tensor, how many entries equal to it count, and how many in all."""
    found = magnitude_threshold(references, experts, rank)
    value, ties = float(found.values[0]), int(found.ties[0])
    if rank == 0:
        return value, [0] * len(experts), [0] * len(experts)
    counts = [count_magnitudes(*pair, value) for pair in zip(references, experts, strict=True)]
    shares = allot_ties((equal for _, equal in counts), ties)
    return value, shares, [greater + share for (greater, _), share in zip(counts, shares, strict=True)]


def _sum_abs(rows: SparseRows | None) -> float:
    return rows.sum_abs() if rows is not None else 0.0
