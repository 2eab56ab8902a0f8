"""IntervMerge's interventions: what a task adds to a block's hidden vectors to undo what merging did to them.

They act on the output of the attention sub-layer, before it is added to the residual stream, at one token position.
Every function takes hidden vectors [..., d] and matrices, all NumPy arrays or all torch tensors, and answers new
ones; nothing is written to. R is [d, r] with orthonormal columns, W1 and W2 are [r, d].

Source: IntervMerge, Osial et al. 2024, arXiv:2412.17023; ReFT, arXiv:2404.03592; METHODS.md section 12.
"""

from collections.abc import Callable, Mapping
from functools import partial

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array

Activation = Callable[[Array], Array]


def linear(values: Array) -> Array:
    """The activation that is none."""
    return values


def noreft(h: Array, *, w1: Array, b1: Array, w2: Array, b2: Array, activation: Activation = linear) -> Array:
    """h + W2^T ( (W1 h + b1) - (W2 h + b2) ); the default of IntervMerge."""
    return h + (activation(h @ w1.T + b1) - (h @ w2.T + b2)) @ w2


def nodireft(h: Array, *, w1: Array, b1: Array, w2: Array, activation: Activation = linear) -> Array:
    """h + W2^T (W1 h + b1)"""
    return h + activation(h @ w1.T + b1) @ w2


def loreft(h: Array, *, r: Array, w1: Array, b1: Array, activation: Activation = linear) -> Array:
    """h + R ( (W1 h + b1) - R^T h )"""
    return h + (activation(h @ w1.T + b1) - h @ r) @ r.T


def direft(h: Array, *, r: Array, w1: Array, b1: Array, activation: Activation = linear) -> Array:
    """h + R (W1 h + b1)"""
    return h + activation(h @ w1.T + b1) @ r.T


def consreft(h: Array, *, r: Array, b: Array) -> Array:
    """h + R (b - R^T h)"""
    return h + (b - h @ r) @ r.T


def lobireft(h: Array, *, r: Array, b: Array) -> Array:
    """h + R b"""
    return h + b @ r.T


def mini(h: Array, *, formula: Callable = noreft, block: int = 0, **matrices) -> Array:
    """`formula` on a slice of h as wide as the matrices, e of d, added to that slice alone.

    Args:
        block: which slice, h[block * e : (block + 1) * e]; the official code takes the first, or, to add R b
            (`lobireft`), that of the block's number ("shifted").

    Raises:
        ShapeError: h has no such slice.
    """
    width = matrices["r"].shape[0] if "r" in matrices else matrices["w2"].shape[1]
    begin, end = block * width, (block + 1) * width
    if not 0 <= begin < end <= h.shape[-1]:
        raise ShapeError(f"hidden vectors of {h.shape[-1]} have no slice [{begin}, {end}) for block {block}")
    changed = _copy(h)
    changed[..., begin:end] = formula(h[..., begin:end], **matrices)
    return changed


# By the names in the official code
INTERVENTIONS: Mapping[str, Callable] = {
    "NoReFT": noreft,
    "NoDiReFT": nodireft,
    "LoReFT": loreft,
    "DiReFT": direft,
    "ConsReFT": consreft,
    "LobiReFT": lobireft,
    "miniInterv": mini,
    "miniInterv_best_efficient": partial(mini, formula=lobireft),
}


def at_position(hidden: Array, position: int, intervention: Callable[[Array], Array]) -> Array:
    """hidden [tokens, ..., d], of which the vectors of one token are changed; 0 is the class token."""
    changed = _copy(hidden)
    changed[position] = intervention(hidden[position])
    return changed


def _copy(array: Array) -> Array:
    return array.clone() if hasattr(array, "clone") else array.copy()
