"""AdaMerging: Task Arithmetic with a learnt coefficient between 0 and 1 for each expert, or expert and tensor.

The coefficients are learnt elsewhere. Layer by layer they are given as

    models:
      - model: math
        parameters:
          weight: [{filter: layers.0., value: 0.27}, {filter: layers.1., value: 0.41}, {value: 0.3}]

IntervMerge's arithmetic (arXiv:2412.17023) is the same. AdaMerging++ is `adamerging_plus_plus`.
"""

from collections.abc import Sequence

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array
from freemerge.methods import PerExpert
from freemerge.methods._coefficients import per_expert

SCOPE = "element"
SOURCE = "AdaMerging, Yang et al. 2023, arXiv:2310.02575, and IntervMerge, arXiv:2412.17023; METHODS.md sections 12, 14"
ALIASES = {"lambda": "weight"}


def merge_tensor(base: Array, experts: Sequence[Array], *, name: str, weight: PerExpert = 0.3, out: Array) -> None:
    """Write base + sum_t clip(weight[t], 0, 1) * (experts[t] - base).

    Args:
        weight: the expert's coefficient, as learnt; below 0 counts as 0, above 1 as 1. Coefficients learnt for every
            layer are written in the recipe as a list of {filter: part of a tensor's name, value: number}.
    """
    weights = [min(max(value, 0.0), 1.0) for value in per_expert(weight, len(experts))]
    add_task_vectors(base, experts, weights, out=out)
