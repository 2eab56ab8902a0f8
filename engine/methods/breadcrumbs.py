"""Breadcrumbs: of every task vector the entries that are neither the very largest nor small, summed."""

from collections.abc import Sequence
from typing import Literal

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.methods import Patterns, PerExpert, TensorPlan, matches
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import add_kept, check_share, crumb_masks, plan_masked

SCOPE = "tensor"
SOURCE = "Davari and Belilovsky 2023, arXiv:2312.06795, as in mergekit's breadcrumbs; METHODS.md sections 1.6 and 15"
ALIASES = {"lambda": "scaling"}
# in the FREE-Merging repository: rows compete, and gamma of each row goes first
VARIANTS = {"roberta": {"selection": "row", "exclude": ("classifier",), "density": 0.1, "gamma": 0.02, "scaling": 0.5}}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    gamma: PerExpert = 0.01,
    scaling: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    selection: Literal["tensor", "row"] = "tensor",
    exclude: Patterns = (),
    out: Array,
) -> None:
    """Write base + scaling * sum_t weight[t] * the kept entries of experts[t] - base.

    Args:
        weight: weight of the expert's task vector.
        density: share of the entries of the task vector that is kept; from 1 on all of them, whatever gamma.
        gamma: share of the very largest entries that is left out.
        scaling: the coefficient on the sum.
        normalize: divide the sum by the sum of the weights.
        rescale: multiply what is kept of a task vector so that the sum of its magnitudes is what it was.
        selection: which entries compete: those of a tensor, or those of each row.
        exclude: tensors with one of these in their names stay as in the base.
    """
    if matches(name, exclude):
        return add_task_vectors(base, [], [], out=out)
    return add_kept(
        base,
        experts,
        crumb_masks(base, experts, density, gamma, selection),
        weights=per_expert(weight, len(experts)),
        scaling=scaling,
        normalize=normalize,
        rescale=rescale,
        elect=False,
        out=out,
    )


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, gamma: PerExpert, exclude: Patterns, **_
) -> TensorPlan:
    if matches(name, exclude):
        return TensorPlan("copy")
    check_share("gamma", per_expert(gamma, experts))
    return plan_masked("neither largest nor small, sum", shape, experts, sweeps=3)
