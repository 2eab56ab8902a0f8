"""Linear: the weighted mean (or sum) of the experts; the base takes part only if it is listed as one of them."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods import PerExpert
from freemerge.methods._coefficients import coefficients, per_expert

SCOPE = "element"
SOURCE = "model soups, Wortsman et al. 2022, arXiv:2203.05482; mergekit's linear; METHODS.md section 15"
USES_BASE = False


def merge_tensor(
    base: Array | None,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert = 1.0,
    normalize: bool = True,
    out: Array,
) -> None:
    """Write sum_t weight[t] * experts[t], divided by the sum of the weights if `normalize`.

    Args:
        weight: weight of the expert.
        normalize: divide by the sum of the weights.
    """
    weighted_sum(experts, coefficients(per_expert(weight, len(experts)), 1.0, normalize), out=out)
