"""SCE: the entries the experts disagree about most, where signs agree, weighted by how far each expert moved them."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.array import Array, empty, numel
from freemerge.kernels.count_magnitudes import count_magnitudes
from freemerge.kernels.magnitude_mask import magnitude_mask
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.mask_statistics import mask_statistics
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.kernels.task_vector_variance import task_vector_variance
from freemerge.methods import TensorPlan
from freemerge.methods._masked_sum import check_share, plan_masked

SCOPE = "tensor"
SOURCE = "FuseChat, Wan et al. 2024, arXiv:2408.07990, as in mergekit's sce; METHODS.md section 15"

SMALLEST = 1e-6  # of a sum of mean squares or of weights; mergekit's


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, select_topk: float = 1.0, out: Array) -> None:
    """Write base plus the weighted mean of the task vectors where they are selected and have the elected sign.

    An expert's weight in a tensor is its share of the mean squares of the selected entries; they are all the same
    where these mean squares add up to less than 1e-6, as those of real fine-tunes often do.

    Args:
        select_topk: share of the entries that is merged, those whose variance over the experts is largest, of those
            that vary at all; the others stay as in the base.
    """
    mask = None if select_topk >= 1 else _most_varied(base, experts, select_topk)
    weights = _weights([square / max(numel(base), 1) for square in _squares(base, experts, mask)])
    add_masked(
        base,
        experts,
        [mask] * len(experts),
        weights,
        votes=[1.0] * len(experts),
        shares=weights,
        least=SMALLEST,
        out=out,
    )


def _most_varied(base: Array, experts: Sequence[Array], share: float) -> Array:
    variance = empty(base.shape, np.dtype(np.float32), base)
    task_vector_variance(base, experts, out=variance)
    varied, _ = count_magnitudes(None, variance, 0.0)
    mask = empty_mask(base)
    magnitude_mask(None, variance, magnitude_threshold([None], [variance], int(share * varied)), None, out=mask)
    return mask


def _squares(base: Array, experts: Sequence[Array], mask: Array | None) -> list[float]:
    if mask is None:
        return task_vector_statistics(base, experts).sum_squares.tolist()
    return [mask_statistics(base, expert, mask).kept_squares for expert in experts]


def _weights(squares: Sequence[float]) -> list[float]:
    total = sum(squares)
    return [1 / len(squares) if total < SMALLEST else square / total for square in squares]


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, select_topk: float, **_) -> TensorPlan:
    check_share("select_topk", [select_topk])
    plan = plan_masked("select, elect, weigh", shape, experts, sweeps=2)
    variance = 0 if select_topk >= 1 else 4 * int(np.prod(shape, dtype=np.int64))
    return TensorPlan(plan.action, plan.transform, plan.workspace // experts + variance, plan.cost)
