"""NearSWAP: the base, with entries of the expert wherever the two are near each other."""

from collections.abc import Sequence

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array
from freemerge.kernels.near_swap import near_swap
from freemerge.methods import TensorPlan
from freemerge.methods._masked_sum import check_experts

SCOPE = "element"
SOURCE = "mergekit's nearswap; METHODS.md section 15"


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, t: float | None = None, out: Array) -> None:
    """Write k * expert + (1 - k) * base, k = t / |base - expert| where that is below 1, else 1.

    Args:
        t: the difference up to which the expert's entry is taken whole; further away the base weighs more and more.
            It has to be given: what is near depends on the models.
    """
    near_swap(base, experts[0], t, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, t: float | None, **_) -> TensorPlan:
    check_experts("nearswap", experts, exactly=1)
    if t is None:
        raise RecipeError("t: nearswap has no default for it; give the difference up to which the expert is taken")
    return TensorPlan("merge", "interpolate by distance")
