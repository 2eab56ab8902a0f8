"""AdaMerging++: AdaMerging of the entries that TIES selects over the model, with learnt coefficients.

The coefficients are learnt elsewhere, and given as for `adamerging`. IntervMerge's `pruned` arithmetic is the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from freemerge.kernels.array import Array
from freemerge.methods import PerExpert, TensorPlan, _trimming
from freemerge.methods._coefficients import per_expert
from freemerge.methods._order_statistics import Search
from freemerge.methods._trimming import Trim

SCOPE = "model"
SWEEPS = _trimming.SWEEPS
is_settled = _trimming.is_settled
SOURCE = "AdaMerging, Yang et al. 2023, arXiv:2310.02575, and IntervMerge, arXiv:2412.17023; METHODS.md sections 12, 14"
ALIASES = {"lambda": "weight"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 0.3,
    density: float = 0.2,
    settled: Trim,
    out: Array,
) -> None:
    """Write base + sum_t clip(weight[t], 0, 1) * tau'_t, tau'_t the entries that `ties_merging` selects.

    Of every task vector the entries are kept that are as large as the smallest of the `density` largest of the model,
    and of these those that have the elected sign: that of their sum, or the model's majority sign where it is zero.

    Args:
        weight: the expert's coefficient, as learnt; below 0 counts as 0, above 1 as 1. Coefficients learnt for every
            layer are written in the recipe as a list of {filter: part of a tensor's name, value: number}.
        density: share of the entries of the task vector that is kept, and one entry more.
    """
    weights = [min(max(value, 0.0), 1.0) for value in per_expert(weight, len(experts))]
    _trimming.add_selected(base, experts, settled, weights, out=out)


def measure_tensor(
    base: Array, experts: Sequence[Array], *, name: str, settled: Search | None = None, **_
) -> np.ndarray:
    return _trimming.measure_trim(base, experts, settled)


def settle(
    statistics: Mapping[str, np.ndarray], *, density: float, settled: Search | None = None, **_
) -> Search | Trim:
    return _trimming.settle_trim(statistics, settled, density, None)


def plan_tensor(name: str, shape: tuple[int, ...], *, density: float, **_) -> TensorPlan:
    _trimming.check_trim(density, None)
    return TensorPlan("merge", "trim over the model, elect, weighted sum", elementwise=True)
