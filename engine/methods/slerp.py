"""SLERP: base and expert interpolated along the arc between them."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.dot_products import dot_products
from freemerge.methods import TensorPlan
from freemerge.methods._angles import add_combination, slerp
from freemerge.methods._masked_sum import check_experts

SCOPE = "tensor"
SOURCE = "Shoemake 1985, as in mergekit's slerp; METHODS.md section 15"

STRAIGHT = 1 - 0.9995**2  # mergekit: from a cosine of 0.9995 on


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, t: float = 0.5, out: Array) -> None:
    """Write sin((1 - t) a) / sin(a) * base + sin(t a) / sin(a) * expert, a the angle between the two whole tensors.

    Where the cosine of a is above 0.9995, as it nearly always is for a fine-tune of the base, that is
    (1 - t) * base + t * expert.

    Args:
        t: the way from the base, 0, to the expert, 1.
    """
    pair = [base, experts[0]]
    add_combination(None, pair, slerp(dot_products(None, pair), t, STRAIGHT), out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **_) -> TensorPlan:
    check_experts("slerp", experts, exactly=1)
    return TensorPlan("merge", "arc, whole tensor")
