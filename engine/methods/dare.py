"""DARE, the paper's: entries of the task vectors dropped at random, the rest divided by density, then merged.

mergekit's `dare_linear` and `dare_ties` rescale by what was really dropped instead of dividing by the density. With
the paper's TIES as second method it is `dare_ties_merging`.
"""

from collections.abc import Sequence
from typing import Literal

from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.methods import Patterns, TensorPlan, matches
from freemerge.methods._masked_sum import check_share, drawn_masks, plan_masked

SCOPE = "tensor"
SOURCE = "Yu et al. 2023, arXiv:2311.03099, code yule-BUAA/MergeLM; METHODS.md section 4"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    density: float = 0.1,
    rescale: bool = True,
    then: Literal["task_arithmetic", "average"] = "task_arithmetic",
    scaling: float = 0.3,
    exclude: Patterns = (),
    seed: int = 0,
    out: Array,
) -> None:
    """Write base + scaling * sum_t h_t, or with `average` base + mean_t h_t; h_t what is kept of experts[t] - base.

    mergekit's versions, dare_linear and dare_ties, rescale by what was really dropped instead of by density.

    Args:
        density: probability that an entry of a task vector is kept: 1 minus the paper's drop rate.
        rescale: divide what is kept by density.
        then: how the dropped task vectors are merged.
        scaling: the coefficient on the sum of task_arithmetic.
        exclude: tensors with one of these in their names stay as in the base.
        seed: of the draws, which depend on it, the tensor's name, the expert's place and the entry's, nothing else.
    """
    if matches(name, exclude):
        return add_task_vectors(base, [], [], out=out)
    masks = drawn_masks(base, experts, name, density, seed=seed)
    factor = 1 / density if rescale and density > 0 else 1.0
    weights = [factor * (scaling if then == "task_arithmetic" else 1 / len(experts))] * len(experts)
    return add_masked(base, experts, masks, weights, out=out)


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, density: float, exclude: Patterns, **_
) -> TensorPlan:
    check_share("density", [density])
    return TensorPlan("copy") if matches(name, exclude) else plan_masked("drop at random, sum", shape, experts)
