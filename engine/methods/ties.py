"""TIES: of every task vector the largest entries, of these the ones whose sign wins an election, summed."""

from collections.abc import Sequence

from freemerge.kernels.array import Array, numel
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import add_kept, plan_masked, ranked_mask

SCOPE = "tensor"
SOURCE = "Yadav et al. 2023, arXiv:2306.01708, as in mergekit's ties; METHODS.md section 15"
ALIASES = {"lambda": "scaling"}


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    scaling: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    out: Array,
) -> None:
    """Write base + scaling * the sum of the weighted, trimmed task vectors, where their sign is the elected one.

    The sign of an entry is that of the weighted sum of the trimmed task vectors; a sum of zero elects +. This is
    mergekit's version: the entries of a tensor compete. In the paper those of the whole model do.

    Args:
        weight: weight of the expert's task vector.
        density: share of the entries of the task vector that is kept, those of largest magnitude, at least one; 0
            leaves the expert out.
        scaling: the coefficient on the sum.
        normalize: divide each entry by the sum of the weights that agree about its sign.
        rescale: multiply a trimmed task vector so that the sum of its magnitudes is what it was.
    """
    densities = per_expert(density, len(experts))
    masks = [
        ranked_mask(base, expert, 0, count_of(share, numel(expert)))
        for expert, share in zip(experts, densities, strict=True)
    ]
    add_kept(
        base,
        experts,
        masks,
        weights=per_expert(weight, len(experts)),
        scaling=scaling,
        normalize=normalize,
        rescale=rescale,
        elect=True,
        out=out,
    )


def count_of(density: float, n: int) -> int:
    """How many of n entries are kept: int(density * n), but one at least."""
    if density <= 0:
        return 0
    return min(n, max(1, int(density * n)))


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    return plan_masked("trim, elect, sum", shape, experts)
