"""Karcher: the mean of the experts on the sphere, the point of least squared angles, found by iteration."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array
from freemerge.kernels.dot_products import dot_products
from freemerge.methods import TensorPlan
from freemerge.methods._angles import add_combination, karcher

SCOPE = "tensor"
SOURCE = "mergekit's karcher; METHODS.md section 15"
USES_BASE = False


def merge_tensor(
    base: Array | None, experts: Sequence[Array], *, name: str, max_iter: int = 10, tol: float = 1e-5, out: Array
) -> None:
    """Write the Karcher mean of the experts' directions, times the mean of their lengths. All weigh the same.

    Every iteration happens on the dot products of the experts: whatever their number, each is read twice.

    Args:
        max_iter: after how many steps to stop.
        tol: a shorter step ends it; an expert as short as this has no direction.
    """
    alone = len(experts) == 1
    numbers = np.ones(1) if alone else karcher(dot_products(None, experts)[0], max_iter, tol)
    add_combination(None, experts, numbers[None], out=out)


def plan_tensor(name: str, shape: tuple[int, ...], **_) -> TensorPlan:
    return TensorPlan("merge", "mean on the sphere, whole tensor")
