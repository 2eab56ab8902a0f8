"""EMR-Merging: one vector for all experts, and for each a mask of it and a scale that give its model back.

Entry by entry, with tau_t = theta_t - base:

    g = +1 where sum_t tau_t > 0, else -1;    U = g * max(0, max_t g * tau_t);    M_t = [ g * tau_t > 0 ]
    lambda_t = mean |tau_t| / mean |M_t * U|;    task t: base + lambda_t * M_t * U

U lies once beside the base, in the dtype of the result, M_t and lambda_t in the expert: an eighth of a byte a weight.
The base is the backbone because U alone is no model, and only the very base gives the weights of the tasks exactly.
lambda_t is 0 for an expert equal to the base.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from freemerge.kernels._masks import empty_mask, mask_bytes
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, dtype_of, empty, numel
from freemerge.kernels.unified_vector import unified_vector
from freemerge.methods import TensorPlan
from freemerge.methods._task_vectors import DENSE, add_update
from freemerge.parts import Arrays, Cut, Layout, Mask

SCOPE = "tensor"
SOURCE = "EMR-Merging, Huang et al. 2024, arXiv:2405.17461; METHODS.md section 5"
WRITES_EXPERTS = True
DESCRIBED = ("means",)
VARIANTS = {"per_tensor_means": {"means": "per_tensor"}, "flat_mean": {"means": "flat"}}

SWEEP = 2.0  # nanoseconds an element and expert, of one core: the vector, a mask, two sums


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    means: Literal["per_tensor", "flat"] = "per_tensor",
    backbone: Literal["base", "unified"] = "base",
    out: Array,
) -> None:
    """Write the base; beside it go U, the largest change of any expert in the direction of the sum of all, and for each
    expert the mask of the entries in which it goes that way, scaled to be as large as its own changes.

    Args:
        means: what an average is: per_tensor adds up the means of all tensors, whatever their size; flat is the mean
            over all elements of the model.
        backbone: what is published: the base, which the experts belong on, or base + U as a plain model without them.
    """
    if backbone == "base":
        return add_task_vectors(base, [], [], out=out)
    unified = empty(tuple(base.shape), np.dtype(np.float32), base)
    unified_vector(base, experts, masks=[empty_mask(base) for _ in experts], out=unified)
    return add_update(base, unified, 1.0, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, backbone: str, **_) -> TensorPlan:
    size = math.prod(shape)
    described = "unified vector and masks" if backbone == "base" else "base and unified vector"
    return TensorPlan("merge", described, DENSE * size + experts * mask_bytes(size), SWEEP * size * (experts + 1))


def leaves_experts(*, backbone: str = "base", **_) -> bool:
    return backbone == "base"


def plan_expert(name: str, shape: tuple[int, ...], dtype: np.dtype, **_) -> Layout:
    return Mask.planned(shape)


def plan_shared(name: str, shape: tuple[int, ...], dtype: np.dtype, **_) -> Arrays:
    return {"vector": (dtype, shape)}


def cut_experts(
    base: Array, merged: Array, experts: Sequence[Array], *, name: str, means: str, within=None, **_
) -> Cut:
    masks = [empty_mask(base) for _ in experts]
    unified = empty(tuple(base.shape), dtype_of(merged), base)
    sums = unified_vector(base, experts, masks=masks, out=unified)
    elements = max(numel(base), 1) if means == "per_tensor" else 1
    statistics = [
        {"moved": float(moved) / elements, "kept": float(kept) / elements}
        for moved, kept in zip(sums.sum_abs, sums.kept_abs, strict=True)
    ]
    return Cut([Mask(mask, unified, tuple(base.shape)) for mask in masks], statistics, {"vector": unified})


def expert_scale(statistics: Sequence[dict[str, float]], **_) -> float:
    """lambda: 0 for an expert that nothing of U belongs to."""
    moved, kept = (math.fsum(one[key] for one in statistics) for key in ("moved", "kept"))
    return moved / kept if kept else 0.0
