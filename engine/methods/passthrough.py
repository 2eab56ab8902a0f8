"""Passthrough: one model as it is, for stacks of layers; the base is not used."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import check_experts

SCOPE = "element"
SOURCE = "mergekit's passthrough; METHODS.md section 15"
USES_BASE = False


def merge_tensor(
    base: Array | None, experts: Sequence[Array], *, name: str, scale: PerExpert = 1.0, out: Array
) -> None:
    """Write scale * expert.

    Args:
        scale: a factor on every entry, most of use with filters.
    """
    weighted_sum(experts, per_expert(scale, 1), out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, scale: PerExpert, **_) -> TensorPlan:
    check_experts("passthrough", experts, exactly=1)
    return TensorPlan("merge", "copy" if per_expert(scale, 1) == [1] else "scale")
