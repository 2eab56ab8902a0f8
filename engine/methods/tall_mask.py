"""TALL masks, Consensus: the summed task vectors, only where enough experts claim an entry of the sum as theirs.

With `backbone: base` nothing is merged: the base is published, m beside it, once, in the dtype of the result, and for
each expert the mask of the entries it claims: task t is base + mask_t * m.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels._masks import empty_mask, mask_bytes, pack_mask
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, dtype_of, empty, numel, task_vector
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._task_vectors import DENSE, add_update, namespace, sum_of_task_vectors
from freemerge.parts import Arrays, Cut, Layout, Mask

SCOPE = "element"
RUN = 1 << 21  # elements that the engine has merged at a time on the CPU, at most
SOURCE = "Localizing Task Information, Wang et al. 2024, arXiv:2405.07813; METHODS.md section 16"
WRITES_EXPERTS = True
DESCRIBED = ("scaling", "threshold")
ALIASES = {"tall_lambda": "threshold", "consensus_threshold": "consensus", "lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    scaling: float = 0.3,
    threshold: PerExpert = 0.4,
    consensus: int = 2,
    task: int | None = None,
    backbone: Literal["consensus", "base"] = "consensus",
    out: Array,
) -> None:
    """Write base + m where at least `consensus` of the experts claim an entry, m = scaling * sum_t tau_t.

    Expert t claims the entries where |tau_t| > threshold[t] * |m - tau_t|, tau_t = experts[t] - base.

    Args:
        scaling: the coefficient on the sum.
        threshold: how much larger than threshold times the rest of the sum the expert's own part must be; 0.2 to 0.6.
        consensus: how many experts have to claim an entry. 1 leaves out what no expert needs, 2 also what only one
            needs.
        task: number of an expert, from 0: write what it alone claims, its own model; consensus does not matter then.
        backbone: what is published: the consensus (or the model of one task), or the base with m and the masks of the
            experts beside it; consensus and task do not matter then.
    """
    if backbone == "base":
        return add_task_vectors(base, [], [], out=out)
    base, out, *experts = (array.reshape(-1) for array in (base, out, *experts))
    merged = sum_of_task_vectors(base, experts)
    merged *= scaling
    thresholds = per_expert(threshold, len(experts))
    if task is not None:
        merged *= _claimed(base, experts[task], merged, thresholds[task])
    else:
        pairs = zip(experts, thresholds, strict=True)
        merged *= sum(1 * _claimed(base, expert, merged, value) for expert, value in pairs) >= consensus
    return add_update(base, merged, 1.0, out=out)


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, consensus: int, task: int | None, backbone: str, **_
) -> TensorPlan:
    if backbone == "base":
        held = math.prod(shape) * DENSE + experts * mask_bytes(math.prod(shape))
        return TensorPlan("merge", "sum and masks", held + 5 * DENSE * min(math.prod(shape), RUN))
    if task is None and not 1 <= consensus <= experts:
        raise RecipeError(f"consensus is {consensus}, but there are {experts} experts; choose 1 to {experts}")
    if task is not None and not 0 <= task < experts:
        raise RecipeError(f"task is {task}, but the experts are numbered 0 to {experts - 1}")
    claimed = f"claimed by {'expert ' + str(task) if task is not None else f'{consensus} or more'}"
    return TensorPlan("merge", claimed, 5 * DENSE * min(math.prod(shape), RUN))


def leaves_experts(*, backbone: str = "consensus", **_) -> bool:
    return backbone == "base"


def plan_expert(name: str, shape: tuple[int, ...], dtype: np.dtype, **_) -> Layout:
    return Mask.planned(shape)


def plan_shared(name: str, shape: tuple[int, ...], dtype: np.dtype, **_) -> Arrays:
    return {"vector": (dtype, shape)}


def cut_experts(
    base: Array, merged: Array, experts: Sequence[Array], *, name: str, scaling: float, threshold: PerExpert, **_
) -> Cut:
    shape, vector, masks = (
        tuple(base.shape),
        empty(numel(base), dtype_of(merged), base),
        [empty_mask(base) for _ in experts],
    )
    base, *experts = (array.reshape(-1) for array in (base, *experts))
    for begin in range(0, numel(base), RUN):
        run = slice(begin, min(begin + RUN, numel(base)))
        total = sum_of_task_vectors(base[run], [expert[run] for expert in experts])
        total *= scaling
        weighted_sum([total], [1.0], out=vector[run])
        for mask, expert, value in zip(masks, experts, per_expert(threshold, len(experts)), strict=True):
            claimed = pack_mask(_claimed(base[run], expert[run], total, value))
            mask[begin // 8 : begin // 8 + len(claimed)] = claimed
    vector = vector.reshape(shape)
    return Cut([Mask(mask, vector, shape) for mask in masks], [{} for _ in masks], {"vector": vector})


def _claimed(base: Array, expert: Array, merged: Array, threshold: float) -> Array:
    # the mask of one expert, bool
    vector = task_vector(base, expert)
    absolute = namespace(vector).abs
    return absolute(vector) > threshold * absolute(merged - vector)
