"""Twin-Merging: a shared model, and for each expert what it knows beyond it, compressed, to add as a router weighs it.

With tau_t = theta_t - base, and C one of two compressions:

    shared = base + scaling * sum_t weight[t] * tau_t;    E_t = C(theta_t - shared)
    weights for an input = shared + sum_t p_t E_t,        p the probabilities of a router

C is the best approximation of rank int(density * the shorter side) (`svd`), or the int(density * elements) largest
entries (`magnitude`). Tensors that are no matrices are kept whole by `svd`, 1-D tensors by both. A rank or number of 0
leaves nothing of the tensor. `freemerge experts apply MERGED math=0.7,code=0.3 OUT` writes the weights for given p; one
expert alone is its task's model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.methods import Patterns, PerExpert, TensorPlan
from freemerge.methods._backbone import Backbone
from freemerge.methods._linear_algebra import PIECE, triplets
from freemerge.methods._spectral import DECOMPOSITION, PRODUCT
from freemerge.methods._task_vectors import DENSE
from freemerge.parts import Cut, Difference, Layout, LowRank, Part, Rows

SCOPE = "tensor"
SOURCE = "Twin-Merging, Lu et al. 2024, arXiv:2406.15479; METHODS.md section 7"
WRITES_EXPERTS = True
DESCRIBED = ("compression", "density", "relative_to")
ALIASES = {"lambda": "scaling"}

NAMED = ("classifier", "bias")
# The official command line gives 1 - density, a mask rate of 0.9; the others are in the authors' code of FREE-Merging
VARIANTS = {
    "original": {"exclude": NAMED, "density": 1 - 0.9},
    "script": {"exclude": NAMED, "density": 1 - 0.9, "scaling": 0.2},
    "roberta": {"exclude": ("classifier",), "scaling": 0.29, "relative_to": "base", "density": 0.2},
    "llm": {
        "elect": True,
        "weight": 0.8,
        "scaling": 1.1,
        "relative_to": "base",
        "density": 0.01,
        "expert_scaling": 0.2,
    },
}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float = 0.1,
    compression: Literal["svd", "magnitude"] = "svd",
    relative_to: Literal["merged", "base"] = "merged",
    expert_scaling: float = 1.0,
    weight: PerExpert = 1.0,
    scaling: float = 0.3,
    elect: bool = False,
    normalize: bool = False,
    exclude: Patterns = (),
    out: Array,
) -> None:
    """Write base + scaling * sum_t weight[t] * (experts[t] - base), the shared model; the experts go beside it.

    Args:
        density: how much of itself an expert keeps, as a share of the rank or of the entries; 1 keeps all.
        compression: svd keeps the leading singular directions of a matrix, magnitude the largest entries of a tensor.
        relative_to: what the expert is the difference to: the merged, shared model, or the base.
        expert_scaling: what experts are multiplied by when they are added.
        weight: weight of the expert's task vector in the shared model.
        scaling: the coefficient on the sum.
        elect: sum only the entries whose sign agrees with the sign of the weighted sum.
        normalize: divide by the sum of the weights; with elect, by those that agree.
        exclude: tensors with one of these in their names stay as in the base, and no expert has them.
    """
    _shared_model(locals()).merge(base, experts, name, out)


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, density: float, compression: str, **parameters
) -> TensorPlan:
    if not 0 <= density <= 1:
        raise RecipeError(f"density: {density} is not a share; give a number from 0 to 1")
    plan = _shared_model(parameters).plan(name, shape, experts)
    if plan.action == "copy":
        return plan
    size, held = math.prod(shape), _planned(shape, density, compression)
    workspace, cost, described = plan.workspace, plan.cost, f"{plan.transform}; experts: {held and held.kind}"
    if held is not None:
        own = sum(math.prod(sides) * np.dtype(dtype).itemsize for dtype, sides in held.arrays.values())
        workspace += experts * own + DENSE * size
    if held is not None and held.kind == "low_rank":
        n = min(shape)
        workspace += 8 * (4 * n * n + 2 * min(size, PIECE))
        cost += experts * (DECOMPOSITION * n**3 + 2 * PRODUCT * n * size)
    return TensorPlan("merge", described, workspace, cost)


def plan_expert(
    name: str, shape: tuple[int, ...], dtype: np.dtype, *, density: float, compression: str, **parameters
) -> Layout | None:
    return _planned(shape, density, compression) if _shared_model(parameters).covers(name) else None


def cut_experts(
    base: Array,
    merged: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float,
    compression: str,
    relative_to: str,
    within=None,
    **parameters,
) -> Cut:
    reference = merged if relative_to == "merged" else base
    layout = _planned(tuple(base.shape), density, compression) if _shared_model(parameters).covers(name) else None
    parts = [None if layout is None else _compressed(reference, expert, layout) for expert in experts]
    return Cut(parts, [{} for _ in experts])


def expert_scale(statistics: Sequence[dict], *, expert_scaling: float, **_) -> float:
    return expert_scaling


def _shared_model(parameters: Mapping[str, Any]) -> Backbone:
    """The backbone of fr with nothing filtered."""
    own = {key: parameters[key] for key in ("weight", "scaling", "elect", "normalize", "exclude")}
    return Backbone(
        **own,
        cutoff=0.0,
        radius_from="min",
        inner_ring="clean",
        align=False,
        include=(),
        filter=(),
        unfiltered=(),
        bias_rule="sum",
    )


def _planned(shape: tuple[int, ...], density: float, compression: str) -> Layout | None:
    # products of doubles, cut off: METHODS section 0
    size = math.prod(shape)
    if size == 0 or density <= 0:
        return None
    whole = density >= 1 or len(shape) < 2 or (compression == "svd" and len(shape) > 2)
    if whole:
        return Difference.planned(shape)
    if compression == "magnitude":
        count = int(density * size)
        return Rows.planned(shape, count) if count else None
    rank = int(density * min(shape))
    return LowRank.planned(shape, rank) if rank else None


def _compressed(reference: Array, expert: Array, layout: Layout) -> Part:
    if layout.kind == "rows":
        return Rows.cut(sparse_rows(reference, expert, last=layout.arrays["values"][1][0]))
    vector = task_vector(reference, expert)
    if layout.kind == "difference":
        return Difference(vector, layout.shape)
    return LowRank.of_triplets(triplets(vector, layout.arrays["left"][1][1]), layout.shape)
