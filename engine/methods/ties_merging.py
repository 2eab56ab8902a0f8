"""TIES-Merging, the paper's: task vectors trimmed over the whole model, of the rest the entries of the elected sign.

In mergekit's version, `ties`, the entries of each tensor compete. The variant `original` is the default, `mergelm` has
the threshold at the int(mask_rate * d)-th smallest of d magnitudes. Three sweeps over the model find the exact
thresholds, a digit of the magnitudes each, without sorting or keeping them, and one the majority sign.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.add_trimmed import add_trimmed
from freemerge.kernels.array import Array
from freemerge.methods import Patterns, TensorPlan, _trimming, matches
from freemerge.methods._order_statistics import Search
from freemerge.methods._trimming import Trim

SCOPE = "model"
SWEEPS = _trimming.SWEEPS
is_settled = _trimming.is_settled
SOURCE = "Yadav et al. 2023, arXiv:2306.01708, code prateeky2806/ties-merging, yule-BUAA/MergeLM; METHODS.md section 2"
ALIASES = {"lambda": "scaling"}
VARIANTS = {"original": {"density": 0.2}, "mergelm": {"mask_rate": 0.8}}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float = 0.2,
    mask_rate: float | None = None,
    combination: Literal["mean", "sum", "max"] = "mean",
    scaling: float = 1.0,
    exclude: Patterns = (),
    settled: Trim,
    out: Array,
) -> None:
    """Write base + scaling * the mean of the entries of trimmed task vectors that have the elected sign.

    Of every task vector the entries are kept that are as large as the smallest of the `density` largest of the model,
    ties included. The sign of an entry is that of their sum, the majority sign of the model where that is zero.
    mergekit's version, where the entries of each tensor compete, is `ties`.

    Args:
        density: share of the entries of the task vector that is kept (official: K, in percent), and one entry more.
        mask_rate: instead of density, share of the entries that is trimmed, less one, as MergeLM has it.
        combination: mean, sum or largest of the entries of the elected sign (official: dis-mean, dis-sum, dis-max).
        scaling: the coefficient on it.
        exclude: tensors with one of these in their names stay as in the base, and do not compete.
    """
    if matches(name, exclude):
        return add_task_vectors(base, [], [], out=out)
    return add_trimmed(
        base, experts, settled.floors, zeros=settled.zeros, combination=combination, scaling=scaling, out=out
    )


def measure_tensor(
    base: Array, experts: Sequence[Array], *, name: str, exclude: Patterns, settled: Search | None = None, **_
) -> np.ndarray:
    if matches(name, exclude):
        return _trimming.measure_nothing(len(experts), settled)
    return _trimming.measure_trim(base, experts, settled)


def settle(
    statistics: Mapping[str, np.ndarray],
    *,
    density: float,
    mask_rate: float | None,
    settled: Search | None = None,
    **_,
) -> Search | Trim:
    return _trimming.settle_trim(statistics, settled, density, mask_rate)


def plan_tensor(
    name: str, shape: tuple[int, ...], *, density: float, mask_rate: float | None, exclude: Patterns, **_
) -> TensorPlan:
    _trimming.check_trim(density, mask_rate)
    if matches(name, exclude):
        return TensorPlan("copy", elementwise=True)
    return TensorPlan("merge", "trim over the model, elect, combine", elementwise=True)
