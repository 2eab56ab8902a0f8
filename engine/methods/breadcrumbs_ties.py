"""Breadcrumbs with TIES: the entries neither very large nor small, of these the ones whose sign wins an election."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import add_kept, check_share, crumb_masks, plan_masked

SCOPE = "tensor"
SOURCE = "mergekit's breadcrumbs_ties, of arXiv:2312.06795 and arXiv:2306.01708; METHODS.md section 15"
ALIASES = {"lambda": "scaling"}


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
    out: Array,
) -> None:
    """Write base + scaling * the sum of the weighted kept entries of the task vectors that have the elected sign.

    Args:
        weight: weight of the expert's task vector.
        density: share of the entries of the task vector that is kept; from 1 on all of them, whatever gamma.
        gamma: share of the very largest entries that is left out.
        scaling: the coefficient on the sum.
        normalize: divide each entry by the sum of the weights that agree about its sign.
        rescale: multiply what is kept of a task vector so that the sum of its magnitudes is what it was.
    """
    add_kept(
        base,
        experts,
        crumb_masks(base, experts, density, gamma, "tensor"),
        weights=per_expert(weight, len(experts)),
        scaling=scaling,
        normalize=normalize,
        rescale=rescale,
        elect=True,
        out=out,
    )


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, gamma: PerExpert, **_) -> TensorPlan:
    check_share("gamma", per_expert(gamma, experts))
    return plan_masked("neither largest nor small, elect, sum", shape, experts, sweeps=3)
