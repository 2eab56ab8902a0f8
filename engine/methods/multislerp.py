"""Multi-SLERP: several experts, or their task vectors, averaged on the sphere round their mean direction."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array
from freemerge.kernels.dot_products import dot_products
from freemerge.methods import PerExpert, TensorPlan
from freemerge.methods._angles import add_combination, multislerp
from freemerge.methods._coefficients import per_expert

SCOPE = "tensor"
SOURCE = "mergekit's multislerp; METHODS.md section 15"
BASE_OPTIONAL = True


def merge_tensor(
    base: Array | None,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out: Array,
) -> None:
    """Write the weighted mean of the experts' directions, projected onto the sphere, times their mean length.

    With a base the same is done with task vectors, and added to the base. A single expert is taken as it is.

    Args:
        weight: weight of the expert.
        normalize_weights: divide the weights by their sum.
        eps: what is added to lengths before they divide.
    """
    weights = np.array(per_expert(weight, len(experts)))
    if normalize_weights:
        weights = weights / weights.sum()
    alone = len(experts) == 1
    numbers = np.ones(1) if alone else multislerp(dot_products(base, experts)[0], weights, eps)
    add_combination(base, experts, numbers[None], out=out)


def plan_tensor(name: str, shape: tuple[int, ...], **_) -> TensorPlan:
    return TensorPlan("merge", "mean direction, whole tensor")
