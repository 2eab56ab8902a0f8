"""RAM+: as ram, and what one expert alone moves is amplified, the more of its entries others move too.

What one expert alone moves is multiplied by 1 + r * min(alpha, shared / unique), by the numbers of entries of the
tensor that this expert shares and has alone.
"""

from collections.abc import Sequence

from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.array import Array
from freemerge.kernels.mask_statistics import mask_statistics
from freemerge.methods import TensorPlan
from freemerge.methods._masked_sum import plan_masked
from freemerge.methods._overlaps import moved_masks, shared_mask

SCOPE = "tensor"
SOURCE = "Reinforced Agent Merging, arXiv:2601.13572, as in mergekit's ramplus_tl; METHODS.md section 15"


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    out: Array,
) -> None:
    """Write base plus the mean, over the experts that move an entry, of their task vectors there.

    Where expert t is the only one, its task vector is multiplied by 1 + r * clip(shared_t / unique_t, 0, alpha), with
    the numbers of entries of this tensor that it moves with others and alone.

    Args:
        epsilon: an expert moves an entry if it is further from the base than this.
        r: how much is amplified.
        alpha: the largest ratio of shared to unique entries that counts.
    """
    moved = moved_masks(base, experts, epsilon)
    overlap = shared_mask(moved)
    shared, unique = [mask & overlap for mask in moved], [mask & ~overlap for mask in moved]
    factors = []
    for expert, own_shared, own_unique in zip(experts, shared, unique, strict=True):
        together, alone = (mask_statistics(base, expert, mask).count for mask in (own_shared, own_unique))
        factors.append(1 + r * min(max(together / max(alone, epsilon), 0.0), alpha))
    # every expert twice: no entry is both shared and unique, so what divides is the number of those that share it, or 1
    ones = [1.0] * len(experts)
    add_masked(base, [*experts, *experts], [*shared, *unique], [*ones, *factors], shares=[*ones, *ones], out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    plan = plan_masked("mean of those that move, unique ones amplified", shape, experts, sweeps=2)
    return TensorPlan(plan.action, plan.transform, 3 * plan.workspace, plan.cost)
