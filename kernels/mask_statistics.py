"""mask_statistics: how much of a task vector a mask keeps."""

from typing import NamedTuple

import numpy as np

from freemerge.kernels._masks import check_mask, unpack_mask
from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.checks import check_pair
from freemerge.kernels.dispatch import implementation


class MaskStatistics(NamedTuple):
    """count: of entries kept. sum_abs: of all magnitudes. kept_abs, kept_squares: of the kept entries."""

    count: int
    sum_abs: float
    kept_abs: float
    kept_squares: float


def mask_statistics(base: Array | None, expert: Array, mask: Array) -> MaskStatistics:
    """Measure the entries of float32(expert - base) that `mask` keeps; sums are float64.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        mask: a mask (kernels/_masks.py) over the entries of `expert`.

    Raises:
        ShapeError: arrays and mask do not fit together.

    Source: the L1 rescale of mergekit, METHODS.md section 15 (dare, della, sce).
    """
    check_pair(base, expert)
    check_mask("mask", mask, expert)
    run = implementation("mask_statistics", expert) or mask_statistics_reference
    count, *sums = run(base, expert, mask)
    return MaskStatistics(int(count), *map(float, sums))


def mask_statistics_reference(base: Array | None, expert: Array, mask: Array) -> tuple[float, float, float, float]:
    values = np.abs(task_vector(base, expert)).astype(np.float64)
    kept = values[unpack_mask(mask, expert.shape)]
    return len(kept), values.sum(), kept.sum(), np.square(kept).sum()
