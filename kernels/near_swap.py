"""near_swap: an entry moves from the base to the expert the further, the nearer the two are."""

import numpy as np

from freemerge.kernels.array import Array, store
from freemerge.kernels.checks import check_like
from freemerge.kernels.dispatch import implementation

SMALLEST = 1e-6  # mergekit: a smaller difference counts as this


def near_swap(base: Array, expert: Array, t: float, *, out: Array) -> None:
    """Write the interpolation of base and expert with a share that falls with their difference.

        k = clip( t / max(|base[i] - expert[i]|, 1e-6), 0, 1 );    out[i] = round( k * expert[i] + (1 - k) * base[i] )

    Everything is float32; one rounding.

    Args:
        base: any shape, any float dtype, contiguous.
        expert: of the shape of `base`, any float dtype.
        t: the difference up to which the expert's entry is taken whole.
        out: like `base`, any float dtype; may be `base` or `expert`.

    Raises:
        ShapeError: an array differs in shape, is not contiguous or not of a float dtype.

    Source: mergekit's nearswap, METHODS.md section 15.
    """
    check_like("base", base, expert=expert, out=out)
    run = implementation("near_swap", base) or near_swap_reference
    run(base, expert, t, out)


def near_swap_reference(base: Array, expert: Array, t: float, out: Array) -> None:
    start, end = base.astype(np.float32), expert.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(start - end)
        difference = np.where(difference < np.float32(SMALLEST), np.float32(SMALLEST), difference)
        share = np.clip(np.float32(t) / difference, np.float32(0), np.float32(1))
        store(share * end + (np.float32(1) - share) * start, out)
