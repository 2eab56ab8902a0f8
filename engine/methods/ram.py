"""RAM: every entry the mean of the task vectors that move it, so that what one expert alone learnt is not diluted."""

from collections.abc import Sequence

from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.array import Array
from freemerge.methods import TensorPlan
from freemerge.methods._masked_sum import plan_masked
from freemerge.methods._overlaps import moved_masks

SCOPE = "tensor"
SOURCE = "Reinforced Agent Merging, arXiv:2601.13572, as in mergekit's ram; METHODS.md section 15"


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, epsilon: float = 1e-5, out: Array) -> None:
    """Write base plus the mean, over the experts that move an entry, of their task vectors there.

    Args:
        epsilon: an expert moves an entry if it is further from the base than this.
    """
    ones = [1.0] * len(experts)
    add_masked(base, experts, moved_masks(base, experts, epsilon), ones, shares=ones, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    return plan_masked("mean of those that move", shape, experts, sweeps=0.5)
