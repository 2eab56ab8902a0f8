"""What balance_scores and add_balanced share in Triton: the scores, in the roundings of csrc/cpu/add_balanced.cpp.

e^x and tanh are written out, as they are there, so that a merge on a GPU has the bytes of one on the CPU: compile
kernels that call them with enable_fp_fusion=False.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from freemerge.kernels.balance_scores import inverse_of
from freemerge.kernels.triton._convert import loadable, widen

BLOCK = 1024
MANY = 4  # experts; beyond, a program takes half a block, or their loads would not fit in registers


@triton.jit
def clip(x, low, high):
    """A NaN stays one."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _exponential(x):
    """e^x to about an ulp: x = k ln 2 + r, e^r by the polynomial of Cephes' expf."""
    x = clip(x, -87.0, 88.0)
    k = (x * 1.44269504088896341 + 12582912.0) - 12582912.0  # rounds to an integer
    r = (x - k * 0.693359375) + k * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (p * (r * r) + r + 1.0) * power


@triton.jit
def _tanh(x):
    """Cephes' tanhf of small numbers, 1 - 2 / (e^2x + 1) of others."""
    z = x * x
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    size = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), _exponential(2.0 * tl.abs(x)) + 1.0)
    large = tl.where(x < 0, -size, tl.where(x > 0, size, x))
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def load_balanced(base, experts, lows, highs, inverses, offsets, inside, NORMALIZED: tl.constexpr, T: tl.constexpr):
    """(base in its dtype of arithmetic, the experts as they are stored, the sum that signs are compared with)."""
    start = tl.load(base + offsets, mask=inside, other=0.0)
    loaded = ()
    for t in tl.static_range(T):
        loaded = loaded + (tl.load(experts[t] + offsets, mask=inside, other=0.0),)
    start = widen(start)
    total = tl.zeros(offsets.shape, tl.float32)
    for t in tl.static_range(T):
        entry = (widen(loaded[t]) - start).to(tl.float32)
        if NORMALIZED:
            share = (clip(tl.abs(entry), lows[t], highs[t]) - lows[t]) * inverses[t]
            total += tl.where(entry > 0, share, tl.where(entry < 0, -share, 0.0))
        else:
            total += entry
    return start, loaded, total


@triton.jit
def clipped_and_score(start, expert, low, high, inverse, total, count):
    """The entries of a task vector between two magnitudes, with their signs, and what they score."""
    entry = (widen(expert) - start).to(tl.float32)
    size = clip(tl.abs(entry), low, high)
    share = (size - low) * inverse
    clipped = tl.where(entry < 0, -size, tl.where(entry == 0, 0.0, size))
    return clipped, _exponential(count * (share * share)) * _tanh(entry * total)


def arguments(
    base: torch.Tensor, experts: Sequence[torch.Tensor], lows: Sequence[float], highs: Sequence[float]
) -> tuple:
    """The first five of a kernel that loads by `load_balanced`; an empty tuple is no kernel argument."""
    bounds = list(zip(lows, highs, strict=True))
    inverses = tuple(float(inverse_of(*pair)) for pair in bounds)
    lows, highs = (tuple(map(float, numbers)) or (0.0,) for numbers in (lows, highs))
    return loadable(base), tuple(map(loadable, experts)) or (loadable(base),), lows, highs, inverses or (0.0,)


def block_for(experts: Sequence[torch.Tensor]) -> int:
    return BLOCK if len(experts) <= MANY else BLOCK // 2
