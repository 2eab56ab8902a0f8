"""PCB-Merging: task vectors averaged entry by entry, by how much each counts within its model and among the others.

The score of an entry is exp(T n_t^2) * tanh(tau_t * S), n_t the clipped magnitude brought to 0 ... 1, S the sum that it
has to agree with; W_t is the score where it is among the largest of the model, brought to 0 ... 1, else 0. The variants
`key_steps`, `nlp` and `vision` are the three versions in the authors' repository. Where all magnitudes, or all scores,
of a task vector are equal it counts nothing (officially 0/0). The paper's search for the weights needs data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.add_balanced import add_balanced
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, empty, is_tensor, numel
from freemerge.kernels.balance_scores import balance_scores
from freemerge.methods import Patterns, PerExpert, TensorPlan, _order_statistics, matches
from freemerge.methods._coefficients import per_expert
from freemerge.methods._order_statistics import Search
from freemerge.methods._task_vectors import DENSE

SCOPE = "model"
SWEEPS = 2 * _order_statistics.SWEEPS  # over the magnitudes, over the scores
RUN, RUN_ON_GPU = 1 << 18, 1 << 20  # entries whose scores are held at a time: they stay in a cache, or fill a GPU
SOURCE = "Du et al. 2024, arXiv:2410.02396, code duguodong7/pcb-merging; METHODS.md section 6"
ALIASES = {"lambda": "scaling", "ratio": "density"}
VARIANTS = {
    "key_steps": {"density": 0.1, "clamp": 0.0001},
    "nlp": {"density": 0.2, "clamp": 0.01},
    "vision": {"density": 0.05, "clamp": 0.01, "agreement": "normalized"},
}


@dataclass(frozen=True)
class Settled:
    """The search for where magnitudes are clipped, then that for the scores that are clipped to 0 and to 1."""

    magnitudes: Search
    scores: Search | None = None

    @property
    def scoring(self) -> bool:
        return self.magnitudes.digits == _order_statistics.SWEEPS

    @property
    def clips(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return _halves(self.magnitudes.values)


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    density: float = 0.2,
    clamp: float = 0.01,
    agreement: Literal["task_vectors", "normalized"] = "task_vectors",
    scaling: float = 1.0,
    exclude: Patterns = (),
    settled: Settled,
    out: Array,
) -> None:
    """Write base + scaling * sum_t weight[t] * W_t * c_t / sum_t W_t, c_t the clipped task vectors.

    W_t, from 0 to 1, grows with the magnitude of the entry, relative to its task vector, and with how well its sign
    and size agree with the sum of all; it is 0 but for the share `density` of the entries of the model.

    Args:
        weight: weight of the expert's task vector.
        density: share of the entries of each task vector that counts at all.
        clamp: share of the smallest and of the largest magnitudes that are clipped.
        agreement: an entry has to agree with the sum of the task_vectors, or of the normalized ones (of sign and share
            of the largest magnitude).
        scaling: the coefficient on the mean.
        exclude: tensors with one of these in their names stay as in the base, and do not compete.
    """
    if matches(name, exclude):
        return add_task_vectors(base, [], [], out=out)
    weights = [scaling * number for number in per_expert(weight, len(experts))]
    cuts = _halves(settled.scores.values)
    return add_balanced(base, experts, *settled.clips, *cuts, weights, normalized=agreement == "normalized", out=out)


def measure_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    agreement: str,
    exclude: Patterns,
    settled: Settled | None = None,
    **_,
) -> np.ndarray:
    """Counts of a digit: of the magnitudes, or of the scores."""
    scoring = settled is not None and settled.scoring
    search = None if settled is None else settled.scores if scoring else settled.magnitudes
    if matches(name, exclude):
        return _order_statistics.no_digits(len(experts), search)
    if not scoring:
        return _order_statistics.count_digits(base, experts, search)
    counts = _order_statistics.no_digits(len(experts), search)
    for scores in _scores(base, experts, settled, agreement):
        counts += _order_statistics.count_digits(None, scores, search, magnitudes=False)
    return counts


def settle(
    statistics: Mapping[str, np.ndarray], *, density: float, clamp: float, settled: Settled | None = None, **_
) -> Settled:
    counts = sum(statistics.values())
    if settled is None:
        sizes = [int(n) for n in counts.sum(1)]
        lows = [_rank(n, int(n * clamp)) for n in sizes]
        settled = Settled(_order_statistics.smallest(lows + [_rank(n, int(n * (1 - clamp) - 1)) for n in sizes]))
    if not settled.scoring:
        return replace(settled, magnitudes=_order_statistics.narrowed(settled.magnitudes, [counts]))
    search = settled.scores
    if search is None:
        sizes = [int(n) for n in counts.sum(1)]
        floors = [_rank(n, int(n * (1 - density))) for n in sizes]
        search = _order_statistics.smallest(floors + [_rank(n, n - 1) for n in sizes])
    return replace(settled, scores=_order_statistics.narrowed(search, [counts]))


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, density: float, clamp: float, exclude: Patterns, **_
) -> TensorPlan:
    if not 0 <= density <= 1:
        raise RecipeError(f"density is {density}; it is the share of the entries that count, from 0 to 1")
    if not 0 <= clamp < 0.5:
        raise RecipeError(f"clamp is {clamp}; it is cut off at both ends: give a share below 0.5")
    if matches(name, exclude):
        return TensorPlan("copy", elementwise=True)
    held = experts * DENSE * min(RUN_ON_GPU, math.prod(shape))
    return TensorPlan("merge", "clip and balance over the model", held, elementwise=True)


def _scores(base: Array, experts: Sequence[Array], settled: Settled, agreement: str) -> Iterator[Array]:
    """The scores of one run of entries after the other, [T, n]."""
    base, *experts = (array.reshape(-1) for array in (base, *experts))
    size, most = numel(base), RUN_ON_GPU if is_tensor(base) else RUN
    room = empty((len(experts) * min(most, size),), np.dtype(np.float32), base)
    for start in range(0, size, most):
        run = slice(start, min(start + most, size))
        scores = room[: len(experts) * (run.stop - run.start)].reshape(len(experts), -1)
        ours = [expert[run] for expert in experts]
        balance_scores(base[run], ours, *settled.clips, normalized=agreement == "normalized", out=scores)
        yield scores


def _rank(n: int, index: int) -> int:
    """From 1, of the entry with this place in ascending order, from 0."""
    return max(1, min(n, index + 1))


def _halves(values: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
