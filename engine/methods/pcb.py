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
from freemerge.kernels.count_range import keys_of, value_of
from freemerge.methods import Patterns, PerExpert, TensorPlan, matches
from freemerge.methods import _order_statistics as order_statistics
from freemerge.methods._coefficients import per_expert
from freemerge.methods._order_statistics import Search, sampled
from freemerge.methods._task_vectors import DENSE

SCOPE = "model"
SWEEPS = 2 * order_statistics.SWEEPS  # over the magnitudes, over the scores
RUN, RUN_ON_GPU = 1 << 17, 1 << 20  # entries whose scores are held at a time: they stay in a cache, or fill a GPU
SOURCE = "Du et al. 2024, arXiv:2410.02396, code duguodong7/pcb-merging; METHODS.md section 6"
ALIASES = {"lambda": "scaling", "ratio": "density"}
VARIANTS = {
    "key_steps": {"density": 0.1, "clamp": 0.0001},
    "nlp": {"density": 0.2, "clamp": 0.01},
    "vision": {"density": 0.05, "clamp": 0.01, "agreement": "normalized"},
}


@dataclass(frozen=True)
class Settled:
    """The search for where magnitudes are clipped, then for the scores that are clipped to 0; the largest scores."""

    magnitudes: Search
    scores: Search | None = None
    tops: tuple[float, ...] | None = None

    @property
    def clips(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values = self.magnitudes.values
        return values[: len(values) // 2], values[len(values) // 2 :]


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
    cuts = settled.scores.values, settled.tops
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
    """A sample of the magnitudes, counts; a sample of the scores, counts and beside them the keys of the largest."""
    if matches(name, exclude):
        return _measure_nothing(len(experts), settled)
    if settled is None:
        return order_statistics.sample(base, experts)
    if not settled.magnitudes.complete:
        return order_statistics.count(base, experts, settled.magnitudes)
    if settled.scores is None:
        some = [sampled(array) for array in (base, *experts)]
        return order_statistics.keyed(_all_scores(some, settled, agreement), numel(base), magnitudes=False)
    found = _measure_nothing(len(experts), settled)
    for scores in _scores([base, *experts], settled, agreement):
        found[:, :-1] += order_statistics.count(None, scores, settled.scores)
        if settled.tops is None:
            found[:, -1] = np.maximum(found[:, -1], _largest_keys(scores))
    return found


def _measure_nothing(experts: int, settled: Settled | None) -> np.ndarray:
    if settled is None or (settled.magnitudes.complete and settled.scores is None):
        return order_statistics.no_sample(experts)
    if settled.scores is None:
        return order_statistics.no_counts(settled.magnitudes)
    counts = order_statistics.no_counts(settled.scores)
    return np.column_stack([counts, np.zeros(len(counts), np.int64)])


def settle(
    statistics: Mapping[str, np.ndarray], *, density: float, clamp: float, settled: Settled | None = None, **_
) -> Settled:
    found = statistics.values()
    if settled is None:
        sizes = order_statistics.sizes(found)
        lows = [_rank(n, int(n * clamp)) for n in sizes]
        highs = [_rank(n, int(n * (1 - clamp) - 1)) for n in sizes]
        return Settled(order_statistics.guessed(found, lows + highs))
    if not settled.magnitudes.complete:
        return replace(settled, magnitudes=order_statistics.narrowed(settled.magnitudes, found))
    if settled.scores is None:
        floors = [_rank(n, int(n * (1 - density))) for n in order_statistics.sizes(found)]
        return replace(settled, scores=order_statistics.guessed(found, floors, magnitudes=False))
    tops = settled.tops or tuple(map(value_of, np.max([one[:, -1] for one in found], axis=0).tolist()))
    scores = order_statistics.narrowed(settled.scores, (one[:, :-1] for one in found))
    return replace(settled, scores=scores, tops=tops)


def is_settled(settled: Settled) -> bool:
    return settled.scores is not None and settled.scores.complete


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


def _scores(arrays: Sequence[Array], settled: Settled, agreement: str) -> Iterator[Array]:
    """The scores of one run of entries after the other, [T, n]; of base and experts."""
    base, *experts = (array.reshape(-1) for array in arrays)
    size, most = numel(base), RUN_ON_GPU if is_tensor(base) else RUN
    room = empty((len(experts) * min(most, size),), np.dtype(np.float32), base)
    for start in range(0, size, most):
        run = slice(start, min(start + most, size))
        scores = room[: len(experts) * (run.stop - run.start)].reshape(len(experts), -1)
        ours = [expert[run] for expert in experts]
        balance_scores(base[run], ours, *settled.clips, normalized=agreement == "normalized", out=scores)
        yield scores


def _all_scores(arrays: Sequence[Array], settled: Settled, agreement: str) -> Sequence[Array]:
    """Those of few entries: T arrays."""
    return next(_scores(arrays, settled, agreement), [arrays[0].reshape(-1)] * (len(arrays) - 1))


def _largest_keys(scores: Array) -> np.ndarray:
    return keys_of(scores.amax(1).cpu().numpy() if is_tensor(scores) else scores.max(1))


def _rank(n: int, index: int) -> int:
    """From 1, of the entry with this place in ascending order, from 0."""
    return max(1, min(n, index + 1))
