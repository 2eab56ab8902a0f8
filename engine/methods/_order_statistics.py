"""Exact order statistics over all tensors of a model, by sweeps: in each, a digit of the magnitudes is counted.

A float32 magnitude, as an integer of its bits, is ordered like the number. Its digits are found from the highest down:
of all magnitudes that begin with the digits found so far, how many have which digit next? Nothing is sorted or kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from freemerge.kernels.array import Array, is_tensor
from freemerge.methods._task_vectors import namespace

DIGITS = (11, 10, 10)  # bits; with the sign 32
SWEEPS = len(DIGITS)


@dataclass(frozen=True)
class Search:
    """For each of T vectors the leading digits of its rank-th smallest magnitude.

    found: those digits, as the bits they are.
    ranks: among the magnitudes that begin with them, from 1.
    digits: how many digits are found.
    """

    found: tuple[int, ...]
    ranks: tuple[int, ...]
    digits: int = 0

    @property
    def values(self) -> tuple[float, ...]:
        """The magnitudes, when all digits are found."""
        return tuple(np.array(self.found, np.int32).view(np.float32).tolist())


def count_digits(vector: Array, found: int, digits: int) -> np.ndarray:
    """int64 [2**DIGITS[digits]]: how many magnitudes beginning with `found` have which digit next."""
    xp, below = namespace(vector), sum(DIGITS[digits + 1 :])
    bits = xp.abs(vector).reshape(-1).view(xp.int32)
    width = DIGITS[digits]
    chosen = (bits[(bits >> (below + width)) == found >> (below + width)] >> below) & ((1 << width) - 1)
    counts = xp.bincount(chosen, minlength=1 << width)
    return counts.cpu().numpy() if is_tensor(counts) else counts


def no_digits(count: int, digits: int) -> np.ndarray:
    """What counting the digits of `count` empty vectors gives."""
    return np.zeros((count, 1 << DIGITS[digits]), np.int64)


def narrowed(search: Search, counts: Iterable[np.ndarray]) -> Search:
    """With one digit more; `counts` holds [T, bins] of every tensor."""
    below = sum(DIGITS[search.digits + 1 :])
    found, ranks = [], []
    for start, rank, bins in zip(search.found, search.ranks, sum(counts), strict=True):
        up_to = np.cumsum(bins)
        digit = min(int(np.searchsorted(up_to, rank)), len(bins) - 1)  # of nothing at all: any
        found.append(start | digit << below)
        ranks.append(rank - int(up_to[digit] - bins[digit]))
    return Search(tuple(found), tuple(ranks), search.digits + 1)


def smallest(ranks: Sequence[int]) -> Search:
    """The search for the rank-th smallest magnitude of each vector; rank 1 is the smallest."""
    return Search((0,) * len(ranks), tuple(ranks))
