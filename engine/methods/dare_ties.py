"""DARE with TIES, mergekit's: entries dropped at random, the rest scaled up, summed where signs agree."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import add_kept, drawn_masks, plan_masked

SCOPE = "tensor"
SOURCE = "Yu et al. 2023, arXiv:2311.03099, as in mergekit's dare_ties; METHODS.md section 15"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    scaling: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
    out: Array,
) -> None:
    """Write base + scaling * the sum of the weighted, dropped task vectors, where their sign is the elected one.

    Args:
        weight: weight of the expert's task vector.
        density: probability that an entry of the task vector is kept; 0 or less leaves the expert out, 1 or more keeps
            everything.
        scaling: the coefficient on the sum.
        normalize: divide each entry by the sum of the weights that agree about its sign.
        rescale: multiply what is kept of a task vector so that the sum of its magnitudes is what it was.
        seed: of the draws, which depend on it, the tensor's name, the expert's place and the entry's, nothing else.
    """
    add_kept(
        base,
        experts,
        drawn_masks(base, experts, name, density, seed=seed),
        weights=per_expert(weight, len(experts)),
        scaling=scaling,
        normalize=normalize,
        rescale=rescale,
        elect=True,
        out=out,
    )


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    return plan_masked("drop at random, elect, sum", shape, experts)
