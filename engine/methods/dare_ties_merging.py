"""DARE, then TIES-Merging, the papers': entries dropped at random, the rest trimmed over the model and elected.

What `dare` leaves is rounded to float32, as by the official code, and merged as `ties_merging` does. It holds 4 bytes
an element and expert of the tensors at work. The model is read five times.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from freemerge.kernels._masks import mask_bytes
from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.add_trimmed import add_trimmed
from freemerge.kernels.array import Array, empty
from freemerge.methods import Patterns, TensorPlan, _trimming, matches
from freemerge.methods._masked_sum import check_share, drawn_masks
from freemerge.methods._order_statistics import Search
from freemerge.methods._task_vectors import DENSE
from freemerge.methods._trimming import Trim

SCOPE = "model"
SWEEPS = _trimming.SWEEPS
is_settled = _trimming.is_settled
SOURCE = "Yu et al. 2023, arXiv:2311.03099, code yule-BUAA/MergeLM; METHODS.md sections 2 and 4"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float = 0.1,
    rescale: bool = True,
    mask_rate: float = 0.8,
    scaling: float = 1.0,
    exclude: Patterns = (),
    seed: int = 0,
    settled: Trim,
    out: Array,
) -> None:
    """Write what ties_merging makes of experts whose task vectors are dropped as in dare; they are float32.

    mergekit's version, which does not trim, is `dare_ties`.

    Args:
        density: probability that an entry of a task vector is kept: 1 minus the paper's drop rate.
        rescale: divide what is kept by density.
        mask_rate: share of the entries that is trimmed then, less one; those that were dropped are counted.
        scaling: the coefficient on the mean.
        exclude: tensors with one of these in their names stay as in the base, and do not compete.
        seed: of the draws, which depend on it, the tensor's name, the expert's place and the entry's, nothing else.
    """
    if matches(name, exclude):
        return add_task_vectors(base, [], [], out=out)
    dropped = _dropped(base, experts, name, density, rescale, seed)
    return add_trimmed(base, dropped, settled.floors, zeros=settled.zeros, scaling=scaling, out=out)


def measure_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float,
    rescale: bool,
    exclude: Patterns,
    seed: int,
    settled: Search | None = None,
    **_,
) -> np.ndarray:
    if matches(name, exclude):
        return _trimming.measure_nothing(len(experts), settled)
    return _trimming.measure_trim(base, _dropped(base, experts, name, density, rescale, seed), settled)


def settle(
    statistics: Mapping[str, np.ndarray], *, mask_rate: float, settled: Search | None = None, **_
) -> Search | Trim:
    return _trimming.settle_trim(statistics, settled, 1.0, mask_rate)


def plan_tensor(
    name: str,
    shape: tuple[int, ...],
    *,
    experts: int,
    density: float,
    mask_rate: float,
    exclude: Patterns,
    **_,
) -> TensorPlan:
    check_share("density", [density])
    _trimming.check_trim(1.0, mask_rate)
    if matches(name, exclude):
        return TensorPlan("copy", elementwise=True)
    size = int(np.prod(shape, dtype=np.int64))
    return TensorPlan("merge", "drop, trim over the model, elect", experts * (DENSE * size + mask_bytes(size)))


def _dropped(base: Array, experts: Sequence[Array], name: str, density: float, rescale: bool, seed: int) -> list[Array]:
    """The experts after the drops, rounded to float32 as in the official code."""
    factor = 1 / density if rescale and density > 0 else 1.0
    dropped = [empty(tuple(base.shape), np.dtype(np.float32), base) for _ in experts]
    masks = drawn_masks(base, experts, name, density, seed=seed)
    for expert, mask, out in zip(experts, masks, dropped, strict=True):
        add_masked(base, [expert], [mask], [factor], out=out)
    return dropped
