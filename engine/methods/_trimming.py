"""What the methods share that trim task vectors at thresholds over the model and elect signs: TIES of the papers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, is_tensor, numel, task_vector
from freemerge.kernels.sign_majority import sign_majority
from freemerge.methods import _order_statistics
from freemerge.methods._order_statistics import (
    Search,
    count,
    guessed,
    narrowed,
    no_counts,
    no_sample,
    sample,
    sizes,
)
from freemerge.methods._task_vectors import add_update, namespace

RUN, RUN_ON_GPU = 1 << 16, 1 << 22  # elements that add_selected has temporary arrays of at a time
SWEEPS = _order_statistics.SWEEPS + 1  # thresholds, then the majority sign


@dataclass(frozen=True)
class Trim:
    """The smallest magnitude each task vector keeps, and the sign of sums of zero."""

    floors: tuple[float, ...]
    zeros: int


def measure_trim(base: Array, experts: Sequence[Array], settled: Search | None) -> np.ndarray:
    if settled is None:
        return sample(base, experts)
    if not settled.complete:
        return count(base, experts, settled)
    return np.array(sign_majority(base, experts, settled.values))


def measure_nothing(experts: int, settled: Search | None) -> np.ndarray:
    """What measuring a tensor that is left out gives."""
    if settled is None:
        return no_sample(experts)
    return np.array(0) if settled.complete else no_counts(settled)


def settle_trim(
    statistics: Mapping[str, np.ndarray], settled: Search | None, density: float, mask_rate: float | None
) -> Search | Trim:
    found = statistics.values()
    if settled is None:
        return guessed(found, [_rank(n, density, mask_rate) for n in sizes(found)])
    if not settled.complete:
        return narrowed(settled, found)
    return Trim(settled.values, int(np.sign(sum(map(int, found)))))


def is_settled(settled: Search | Trim) -> bool:
    return isinstance(settled, Trim)


def add_selected(base: Array, experts: Sequence[Array], trim: Trim, weights: Sequence[float], *, out: Array) -> None:
    """Write base + sum_t weights[t] * the entries of trimmed task vector t that have the elected sign.

    Float32 in the order of `experts`, one rounding. Arrays are of one shape, contiguous.
    """
    base, out = base.reshape(-1), out.reshape(-1)
    experts = [expert.reshape(-1) for expert in experts]
    step = RUN_ON_GPU if is_tensor(out) else RUN
    for begin in range(0, numel(out), step):
        run = slice(begin, begin + step)
        selected = _weighted_selection(base[run], [expert[run] for expert in experts], trim, weights)
        add_update(base[run], selected, 1.0, out=out[run])


def _weighted_selection(base: Array, experts: Sequence[Array], trim: Trim, weights: Sequence[float]) -> Array:
    xp = namespace(base)

    def trimmed(t: int) -> Array:
        vector = task_vector(base, experts[t])
        return xp.where(abs(vector) < trim.floors[t], 0, vector)

    votes = sum(map(trimmed, range(len(experts))))
    signs = xp.where(votes == 0, trim.zeros, xp.sign(votes))
    signs = xp.where(signs == 0, -1, signs)  # of a model whose signs are in balance, as in the official code
    total = xp.zeros_like(votes)
    for t, weight in enumerate(weights):
        entries = trimmed(t)
        total += weight * xp.where(xp.sign(entries) == signs, entries, 0)
    return total


def check_trim(density: float, mask_rate: float | None) -> None:
    if not 0 <= density <= 1:
        raise RecipeError(f"density is {density}; it is the share of the entries kept, from 0 to 1")
    if mask_rate is not None and not 0 < mask_rate <= 1:
        raise RecipeError(f"mask_rate is {mask_rate}; it is the share of the entries trimmed, above 0 and at most 1")


def _rank(n: int, density: float, mask_rate: float | None) -> int:
    """The smallest entry kept of n: its rank, from 1, the smallest."""
    if mask_rate is None:
        return max(1, n - int(n * density))  # one entry more than asked, as in the official code
    if n and not int(n * mask_rate):
        raise RecipeError(f"mask_rate {mask_rate} of {n} entries is none; choose a larger one, or density instead")
    return max(1, int(n * mask_rate))
