"""Exact order statistics over all tensors of a model, by sweeps: in each, a digit of the entries is counted.

A float32, as the 32 bits of a key (kernels/count_digits.py), is ordered like the number. The digits of an order
statistic are found from the highest down: of all entries that begin with the digits found so far, how many have which
digit next? Nothing is sorted or kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from freemerge.kernels import count_digits as keys
from freemerge.kernels.array import Array, is_tensor
from freemerge.methods._task_vectors import namespace

DIGITS = (11, 11, 10)  # bits
SWEEPS = len(DIGITS)


@dataclass(frozen=True)
class Search:
    """For each of K order statistics of T vectors the leading digits of its key; the k-th is one of vector k % T.

    found: those digits, as the bits they are.
    ranks: among the entries that begin with them, from 1, the smallest.
    digits: how many digits are found.
    """

    found: tuple[int, ...]
    ranks: tuple[int, ...]
    digits: int = 0

    @property
    def values(self) -> tuple[float, ...]:
        """The order statistics, when all digits are found."""
        return tuple(map(keys.value_of, self.found))


def count_digits(
    base: Array | None, experts: Sequence[Array], search: Search | None = None, *, magnitudes: bool = True
) -> np.ndarray:
    """int64 [K, bins]: how many entries of the task vectors of one tensor have which digit next.

    Before the first digit is found it does not matter what is looked for: [T, bins].

    Args:
        base: None where the experts are task vectors themselves.
        magnitudes: of absolute values.
    """
    digits = search.digits if search else 0
    found = search.found if digits else (0,) * len(experts)
    below, width = sum(DIGITS[digits + 1 :]), DIGITS[digits]
    counted: dict[tuple[int, int], Array] = {}
    for k, start in enumerate(found):
        t = k % len(experts)
        if (t, start) not in counted:
            counted[t, start] = keys.count_digits(base, experts[t], start, below, width, magnitudes=magnitudes)
    counts = [counted[k % len(experts), start] for k, start in enumerate(found)]
    if counts and is_tensor(counts[0]):
        return namespace(counts[0]).stack(counts).cpu().numpy()  # waits for the GPU once
    return np.array(counts)


def no_digits(count: int, search: Search | None = None) -> np.ndarray:
    """What counting the digits of `count` empty vectors gives."""
    digits = search.digits if search else 0
    return np.zeros((len(search.found) if digits else count, 1 << DIGITS[digits]), np.int64)


def narrowed(search: Search, counts: Iterable[np.ndarray]) -> Search:
    """With one digit more; `counts` holds the [K or T, bins] of every tensor."""
    below, total = sum(DIGITS[search.digits + 1 :]), sum(counts)
    found, ranks = [], []
    for k, (start, rank) in enumerate(zip(search.found, search.ranks, strict=True)):
        bins = total[k % len(total)]
        up_to = np.cumsum(bins)
        digit = min(int(np.searchsorted(up_to, rank)), len(bins) - 1)  # of nothing at all: any
        found.append(start | digit << below)
        ranks.append(rank - int(up_to[digit] - bins[digit]))
    return Search(tuple(found), tuple(ranks), search.digits + 1)


def smallest(ranks: Sequence[int]) -> Search:
    """The search for the rank-th smallest entry of each vector, in turn; rank 1 is the smallest."""
    return Search((0,) * len(ranks), tuple(ranks))
