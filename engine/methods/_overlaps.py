"""Where task vectors move the same entries: what ram and ramplus_tl are made of."""

from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np

from freemerge.kernels._masks import empty_mask
from freemerge.kernels.array import Array
from freemerge.kernels.magnitude_mask import magnitude_mask
from freemerge.kernels.magnitude_threshold import Threshold


def moved_masks(base: Array, experts: Sequence[Array], epsilon: float) -> list[Array]:
    """For each expert the mask of the entries with |expert - base| > epsilon."""
    above = Threshold(np.array([epsilon], np.float32), np.zeros(1, np.int64))
    masks = [empty_mask(base) for _ in experts]
    for expert, mask in zip(experts, masks, strict=True):
        magnitude_mask(base, expert, above, None, out=mask)
    return masks


def shared_mask(masks: Sequence[Array]) -> Array:
    """The entries that two masks or more have."""
    pairs = [one & reduce(or_, masks[:t]) for t, one in enumerate(masks) if t > 0]
    return reduce(or_, pairs) if pairs else masks[0] & ~masks[0]
