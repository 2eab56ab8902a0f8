"""magnitude_mask: which entries of a task vector have a magnitude between two thresholds."""

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels._masks import check_mask, pack_mask
from freemerge.kernels.array import Array, magnitude, rows_of
from freemerge.kernels.checks import check_pair
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.magnitude_threshold import Threshold


def magnitude_mask(base: Array | None, expert: Array, lower: Threshold, upper: Threshold | None, *, out: Array) -> None:
    """Write the mask of the entries of |expert - base| that belong to `lower` and not to `upper`.

    To a threshold belong the entries above its value and the first `ties` of those equal to it, in row-major order: a
    threshold of rank k from magnitude_threshold stands for exactly the k largest. NaN counts as infinite.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself.
        expert: of the shape of `base`, any float dtype.
        lower: its values are one, for the whole tensor, or one for each row (slices along the last dimension). They
            lie where `expert` does, or are NumPy arrays.
        upper: as many values, or None: nothing belongs to it.
        out: a mask (kernels/_masks.py) over the entries of `expert`.

    Raises:
        ShapeError: arrays or thresholds do not fit together.

    Source: METHODS.md sections 0 (ties) and 15 (ties, breadcrumbs, sce).
    """
    check_pair(base, expert)
    check_mask("out", out, expert)
    rows = rows_of(expert.shape)[0]
    counts = {len(part) for threshold in (lower, upper) if threshold is not None for part in threshold}
    if len(counts) != 1 or not counts <= {1, rows}:
        raise ShapeError(f"thresholds of {sorted(counts)} values for {rows} rows; give one, or one for each row")
    run = implementation("magnitude_mask", expert) or magnitude_mask_reference
    run(base, expert, lower, upper, out)


def magnitude_mask_reference(
    base: Array | None, expert: Array, lower: Threshold, upper: Threshold | None, out: Array
) -> None:
    magnitudes = magnitude(base, expert)
    magnitudes = magnitudes.reshape((1, -1) if len(lower.values) == 1 else rows_of(expert.shape))
    kept = _belongs(magnitudes, lower)
    if upper is not None:
        kept &= ~_belongs(magnitudes, upper)
    out[...] = pack_mask(kept)


def _belongs(magnitudes: Array, threshold: Threshold) -> Array:
    values, ties = threshold.values[:, None], threshold.ties[:, None]
    equal = magnitudes == values
    return (magnitudes > values) | (equal & (np.cumsum(equal, axis=1) <= ties))
