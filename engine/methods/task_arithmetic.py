"""Task Arithmetic: the base plus the scaled sum of the task vectors."""

from collections.abc import Sequence

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.methods import PerExpert
from freemerge.methods._coefficients import coefficients, per_expert

SCOPE = "element"
SOURCE = "Ilharco et al. 2022, arXiv:2212.04089; METHODS.md sections 3 and 15"
ALIASES = {"lambda": "scaling"}

TYPICAL_SCALING = 0.3


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    weight: PerExpert | None = None,
    scaling: float | None = None,
    normalize: bool = False,
    out: Array,
) -> None:
    """Write base + scaling * sum_t weight[t] * (experts[t] - base).

    Args:
        weight: weight of the expert's task vector; 1 if not given.
        scaling: the coefficient on the sum; if not given, 0.3 (the paper's usual value), but 1 where weights are
            given, as in mergekit.
        normalize: divide the sum by the sum of the weights.
    """
    if scaling is None:
        scaling = TYPICAL_SCALING if weight is None else 1.0
    weights = per_expert(1.0 if weight is None else weight, len(experts))
    add_task_vectors(base, experts, coefficients(weights, scaling, normalize), out=out)
