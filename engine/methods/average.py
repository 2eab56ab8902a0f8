"""Average: the plain mean of the experts, a model soup; the base is not used."""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.weighted_sum import weighted_sum

SCOPE = "element"
SOURCE = "model soups, Wortsman et al. 2022, arXiv:2203.05482; METHODS.md section 3"
USES_BASE = False


def merge_tensor(base: Array | None, experts: Sequence[Array], *, name: str, out: Array) -> None:
    """Write the mean of the T experts."""
    weighted_sum(experts, [1 / len(experts)] * len(experts), out=out)
