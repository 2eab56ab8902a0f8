"""sign_majority: which sign more entries of the sum of trimmed task vectors have."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.add_trimmed import trimmed
from freemerge.kernels.array import Array
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation


def sign_majority(base: Array, experts: Sequence[Array], floors: Sequence[float]) -> int:
    """How many more entries of sum_t h_t are above 0 than below: h_t as in add_trimmed.

    Args:
        base: any shape, any float dtype, contiguous.
        experts: T arrays of the shape of `base`, each of any float dtype.
        floors: T magnitudes.

    Raises:
        ShapeError: arrays do not fit together, or there are not T floors.

    Source: the majority sign of TIES-Merging, METHODS.md section 2.
    """
    check_like("base", base, experts=experts)
    check_count("floors", floors, len(experts), "experts")
    run = implementation("sign_majority", base) or sign_majority_reference
    return run(base, experts, floors)


def sign_majority_reference(base: Array, experts: Sequence[Array], floors: Sequence[float]) -> int:
    with np.errstate(invalid="ignore", over="ignore"):
        total = sum(trimmed(base, experts, floors), np.zeros(base.shape, np.float32))
    return int(np.sum(total > 0)) - int(np.sum(total < 0))
