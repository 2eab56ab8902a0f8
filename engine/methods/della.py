"""DELLA: entries dropped at random, small ones of a row more often, the rest summed where signs agree."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import add_kept, check_draw, drawn_masks, plan_masked

SCOPE = "tensor"
SOURCE = "Deep et al. 2024, arXiv:2406.11617, as in mergekit's della; METHODS.md section 15"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    epsilon: PerExpert = 0.15,
    scaling: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    seed: int = 0,
    out: Array,
) -> None:
    """Write base + scaling * the sum of the weighted, dropped task vectors, where their sign is the elected one.

    Args:
        weight: weight of the expert's task vector.
        density: mean probability that an entry of the task vector is kept; 0 or less leaves the expert out, 1 or more
            keeps everything.
        epsilon: the probability is this much higher for the largest entry of a row and lower for its smallest, with
            the ranks between in between; density - epsilon and density + epsilon lie between 0 and 1.
        scaling: the coefficient on the sum.
        normalize: divide each entry by the sum of the weights that agree about its sign.
        rescale: multiply what is kept of a task vector so that the sum of its magnitudes is what it was.
        seed: of the draws, which depend on it, the tensor's name, the expert's place and the entry's, nothing else.
    """
    add_kept(
        base,
        experts,
        drawn_masks(base, experts, name, density, epsilon, seed=seed),
        weights=per_expert(weight, len(experts)),
        scaling=scaling,
        normalize=normalize,
        rescale=rescale,
        elect=True,
        out=out,
    )


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, density: PerExpert, epsilon: PerExpert, **_
) -> TensorPlan:
    check_draw(per_expert(density, experts), per_expert(epsilon, experts))
    return plan_masked("drop by rank, elect, sum", shape, experts, sweeps=5)
