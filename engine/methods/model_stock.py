"""Model Stock: the mean of the experts, pulled towards the base the further, the less their task vectors agree."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array
from freemerge.kernels.dot_products import dot_products
from freemerge.methods import TensorPlan
from freemerge.methods._angles import add_combination, norms
from freemerge.methods._masked_sum import check_experts

SCOPE = "tensor"
SOURCE = "Jang et al. 2024, arXiv:2403.19522, as in mergekit's model_stock; METHODS.md section 15"

SMALLEST = 1e-6  # of a product of lengths, of a denominator; mergekit's


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, filter_wise: bool = False, out: Array) -> None:
    """Write t * the mean of the experts + (1 - t) * base, t = N c / (1 + (N - 1) c).

    N is the number of experts, c the mean cosine of the angles between their task vectors.

    Args:
        filter_wise: a t for each row instead of one for the whole tensor.
    """
    lines = "row" if filter_wise else "tensor"
    shares = _shares(dot_products(base, experts, lines=lines))
    numbers = np.repeat(shares[:, None] / len(experts), len(experts), axis=1)
    add_combination(base, experts, numbers, lines=lines, out=out)


def _shares(products: np.ndarray) -> np.ndarray:
    count = products.shape[-1]
    lengths = norms(products)
    cosines = products / np.maximum(lengths[:, :, None] * lengths[:, None, :], SMALLEST)
    first, second = np.triu_indices(count, 1)
    cosine = cosines[:, first, second].mean(axis=1)
    denominator = 1 + (count - 1) * cosine
    safe = np.abs(denominator) >= SMALLEST
    return np.where(safe, count * cosine / np.where(safe, denominator, 1), 0)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, filter_wise: bool, **_) -> TensorPlan:
    check_experts("model_stock", experts, at_least=2)
    return TensorPlan("merge", "angles, row by row" if filter_wise else "angles, whole tensor")
