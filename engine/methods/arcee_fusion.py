"""Arcee Fusion: the base, with the entries of the expert that matter far more than most.

One expert. mergekit computes the divergence in float32, where for the small changes of a fine-tune it is rounding
noise, and takes the quartiles of tensors above a million entries from a random sample; here it is float64 and exact,
so such tensors differ.
"""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.array import Array, empty, numel
from freemerge.kernels.fusion_importance import fusion_importance
from freemerge.kernels.magnitude_mask import magnitude_mask
from freemerge.kernels.magnitude_threshold import Threshold, magnitude_threshold
from freemerge.methods import TensorPlan
from freemerge.methods._masked_sum import check_experts, plan_masked

SCOPE = "tensor"
SOURCE = "mergekit's arcee_fusion; METHODS.md section 15"

SPREADS = 1.5  # above the median, in interquartile ranges


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, out: Array) -> None:
    """Write the expert's entry where its importance reaches median + 1.5 * (upper - lower quartile), else the base's.

    The importance of an entry is its change times the divergence of its row, taken as logits, from the base's. The
    quartiles are exact for tensors of any size (mergekit's come from a sample above a million entries), and the
    divergence is computed in float64 (mergekit's is mostly rounding noise for the small changes of a fine-tune).
    """
    if numel(base) == 0:
        return
    importance = empty(base.shape, np.dtype(np.float32), base)
    fusion_importance(base, experts[0], out=importance)
    lower, median, upper = (np.float32(_quantile(importance, share)) for share in (0.25, 0.5, 0.75))
    value = max(median + np.float32(SPREADS) * (upper - lower), np.float32(0))
    least = Threshold(np.array([value], np.float32), np.array([numel(base)], np.int64))
    mask = empty_mask(base)
    magnitude_mask(None, importance, least, None, out=mask)
    add_masked(base, experts, [mask], [1.0], out=out)


def _quantile(values: Array, share: float) -> float:
    n = numel(values)
    return float(magnitude_threshold([None], [values], n - int(share * (n - 1))).values[0])


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    check_experts("arcee_fusion", experts, exactly=1)
    plan = plan_masked("important entries", shape, experts, sweeps=40)
    return TensorPlan(plan.action, plan.transform, plan.workspace + 4 * int(np.prod(shape, dtype=np.int64)), plan.cost)
