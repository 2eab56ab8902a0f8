"""Exact order statistics over all tensors of a model, by sweeps: a sample says where to look, then entries are counted.

The first sweep takes a sample. In each of the next, kernels/count_range.py counts the entries below the range of keys
in which an order statistic lies, and in each bin of that range: the range of the next sweep is one bin. Where the
sample was misleading, and the order statistic lies outside, all other keys are searched. Nothing is sorted or kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from freemerge.kernels.array import Array, is_tensor, magnitude, numel, task_vector
from freemerge.kernels.count_range import KEYS, count_range, keys_of, value_of
from freemerge.methods._task_vectors import namespace

BINS = 2048  # 16 KiB of counts a tensor and order statistic
SWEEPS = 5  # at most: the sample; what it suggests; where that was wrong, all keys in three steps
SAMPLE, RUN = 4096, 64  # entries of a tensor, in runs spread evenly
DEVIATIONS = 5  # standard deviations of the sample's ranks to either side
ZERO = 1 << 31  # the key of 0, the smallest of a magnitude


@dataclass(frozen=True)
class Search:
    """For each of K order statistics of T vectors where its key lies; the k-th is one of vector k % T.

    ranks: from 1, the smallest.
    lows, shifts: in the BINS of 1 << shift keys from low on; shift -1: low it is.
    magnitudes: of absolute values.
    """

    ranks: tuple[int, ...]
    lows: tuple[int, ...]
    shifts: tuple[int, ...]
    magnitudes: bool = True

    @property
    def complete(self) -> bool:
        return not self.open

    @property
    def open(self) -> list[int]:
        """The order statistics that are not known yet."""
        return [k for k, shift in enumerate(self.shifts) if shift >= 0]

    @property
    def values(self) -> tuple[float, ...]:
        """The order statistics, when the search is complete."""
        return tuple(map(value_of, self.lows))


def sampled(array: Array) -> Array:
    """[s]: some entries, the same for all arrays of a shape; all of them if they are few."""
    flat, n = array.reshape(-1), numel(array)
    if n <= SAMPLE:
        return flat
    starts = np.linspace(0, n - RUN, SAMPLE // RUN, dtype=np.int64).tolist()
    return namespace(array).concatenate([flat[start : start + RUN] for start in starts])


def sample(base: Array, experts: Sequence[Array]) -> np.ndarray:
    """int64 [T, 1 + s]: the size of the tensor, and the keys of a sample of its task vectors' magnitudes."""
    start = sampled(base)
    return keyed([task_vector(start, sampled(expert)) for expert in experts], numel(base))


def keyed(vectors: Sequence[Array], size: int, *, magnitudes: bool = True) -> np.ndarray:
    """The same of T vectors that are samples already, of tensors of `size` entries."""
    return np.array([[size, *_keys(task_vector(None, vector), magnitudes)] for vector in vectors], np.int64)


def _keys(values: Array, magnitudes: bool) -> np.ndarray:
    values = values.cpu().numpy() if is_tensor(values) else values
    return keys_of(magnitude(None, values) if magnitudes else values)


def no_sample(count: int) -> np.ndarray:
    """The sample of `count` empty vectors."""
    return np.zeros((count, 1), np.int64)


def sizes(samples: Iterable[np.ndarray]) -> list[int]:
    """The number of entries of each vector."""
    return sum(one[:, 0] for one in samples).tolist()


def guessed(samples: Iterable[np.ndarray], ranks: Sequence[int], *, magnitudes: bool = True) -> Search:
    """The search for the rank-th smallest entry of each vector, in turn; rank 1 is the smallest."""
    samples = list(samples)
    vectors = [_Guess([one[t] for one in samples], magnitudes) for t in range(len(samples[0]))]
    ranges = [vectors[k % len(vectors)].around(rank) for k, rank in enumerate(ranks)]
    return Search(tuple(ranks), *(tuple(part) for part in zip(*ranges, strict=True)), magnitudes)


class _Guess:
    """What a sample says about one vector."""

    def __init__(self, samples: Sequence[np.ndarray], magnitudes: bool):
        keys = np.concatenate([one[1:] for one in samples])
        stands_for = [np.full(len(one) - 1, one[0] / max(1, len(one) - 1)) for one in samples]
        order = np.argsort(keys)
        self.keys, self.up_to = keys[order], np.cumsum(np.concatenate(stands_for)[order])
        self.size = sum(int(one[0]) for one in samples)
        # of the number of entries up to a place in the middle; of others it is less
        self.variance = sum(float(one[0]) ** 2 / len(one) for one in samples if one[0] >= len(one))
        self.first = ZERO if magnitudes else 0

    def around(self, rank: int) -> tuple[int, int]:
        """low and shift of a range that should have the entry of this rank."""
        if self.size == 0:  # of nothing at all: any
            return ZERO, -1
        share = rank / self.size
        margin = DEVIATIONS * (self.variance * share * (1 - share)) ** 0.5 + DEVIATIONS * self.size / len(self.keys)
        margin *= self.variance > 0
        low, high = (int(np.searchsorted(self.up_to, rank + side - 0.5)) for side in (-margin, margin))
        low = min(low, len(self.keys) - 1)
        first = int(self.keys[low]) if rank > margin else self.first
        last = int(self.keys[high]) if high < len(self.keys) else KEYS - 1
        return _range(first, last)


def _range(first: int, last: int) -> tuple[int, int]:
    """low and shift of a range that holds these keys."""
    shift = 0
    while BINS << shift <= last - first:
        shift += 1
    return min(first, KEYS - (BINS << shift)), shift


def count(base: Array | None, experts: Sequence[Array], search: Search) -> np.ndarray:
    """int64 [open, 2 + bins]: how many entries of one tensor are below the range of the search, in its bins, above.

    Args:
        base: None where the experts are task vectors themselves.
    """
    if search.complete:
        return no_counts(search)
    counts: dict[int, Array] = {}
    for t, expert in enumerate(experts):
        asked = [k for k in search.open if k % len(experts) == t]
        lows, shifts = ([one[k] for k in asked] for one in (search.lows, search.shifts))
        rows = count_range(base, expert, lows, shifts, BINS, magnitudes=search.magnitudes)
        counts |= zip(asked, rows, strict=True)
    rows = [counts[k] for k in search.open]
    if is_tensor(experts[0]):
        return namespace(experts[0]).stack(rows).cpu().numpy()  # waits for the GPU once
    return np.array(rows)


def no_counts(search: Search) -> np.ndarray:
    """What counting the entries of empty vectors gives."""
    return np.zeros((len(search.open), BINS + 2), np.int64)


def narrowed(search: Search, counts: Iterable[np.ndarray]) -> Search:
    """After one sweep more; `counts` holds what was counted of every tensor."""
    lows, shifts = list(search.lows), list(search.shifts)
    first = ZERO if search.magnitudes else 0
    for k, row in zip(search.open, sum(counts), strict=True):
        rank, low, shift = search.ranks[k], lows[k], shifts[k]
        up_to = np.cumsum(row[:-1])
        if up_to[0] < rank <= up_to[-1]:
            low += int(np.searchsorted(up_to, rank) - 1) << shift
            lows[k], shifts[k] = _range(low, low + (1 << shift) - 1) if shift else (low, -1)
        elif rank <= up_to[0]:
            lows[k], shifts[k] = _range(first, low - 1)
        else:
            lows[k], shifts[k] = _range(low + (BINS << shift), KEYS - 1)
    return replace(search, lows=tuple(lows), shifts=tuple(shifts))
