"""NuSLERP: two experts, or their task vectors, interpolated along the arc between them."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.dot_products import dot_products
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._angles import add_combination, slerp
from freemerge.methods._coefficients import per_expert
from freemerge.methods._masked_sum import check_experts

SCOPE = "tensor"
SOURCE = "mergekit's nuslerp; METHODS.md section 15"
BASE_OPTIONAL = True

STRAIGHT = 1e-16
NO_WEIGHT = 1e-6


def merge_tensor(
    base: Array | None,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    out: Array,
) -> None:
    """Write the point at share weight[1] / (weight[0] + weight[1]) of the arc between two experts.

    With a base it is the arc between their task vectors, and the point is added to the base.

    Args:
        weight: weight of the expert.
        nuslerp_flatten: one angle for the whole tensor; otherwise one for each row.
        nuslerp_row_wise: without nuslerp_flatten, one angle for each column (mergekit's word for it: it normalises
            along dimension 0).
    """
    first, second = per_expert(weight, 2)
    t = 0.5 if abs(first + second) < NO_WEIGHT else second / (first + second)
    lines = "tensor" if nuslerp_flatten or len(out.shape) < 2 else "column" if nuslerp_row_wise else "row"
    products = dot_products(base, experts, lines=lines)
    add_combination(base, experts, slerp(products, t, STRAIGHT), lines=lines, out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, nuslerp_flatten: bool, **_) -> TensorPlan:
    check_experts("nuslerp", experts, exactly=2)
    return TensorPlan("merge", "arc, whole tensor" if nuslerp_flatten else "arc, line by line")
