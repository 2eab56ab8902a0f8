"""A checkpoint whose embeddings have their rows in another order, with rows of other models and new ones among them."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from freemerge.checkpoint.view import CheckpointView
from freemerge.kernels.array import Array, store

ZERO, AVERAGE, MEAN = -1, -2, -3  # in place of a source
AT_ONCE = 1 << 20  # elements that are gathered or averaged at once


@dataclass(frozen=True)
class Rows:
    """Where the rows of one tensor come from.

    Args:
        sources: (checkpoint, name of the tensor in it), of whatever float dtype.
        owner: int16 [rows]: an index of `sources`; ZERO for a row of zeros, AVERAGE for the mean of the rows in
            `averages`, MEAN for the mean of all rows that are none such themselves.
        row: int64 [rows]: its number there; not looked at without an owner.
        averages: for each row with AVERAGE its (index of `sources`, number) pairs.
    """

    sources: Sequence[tuple[object, str]]
    owner: np.ndarray
    row: np.ndarray
    averages: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)


class RowsView(CheckpointView):
    """The same attributes and methods as reader.Checkpoint; the rows of some tensors are elsewhere.

    A run of rows that follow each other in their source is read as they lie there. All else is gathered in each
    reading, into memory of its own, in the tensor's dtype; a mean is computed in float64 and rounded once.

    Args:
        checkpoint: whose other tensors these are.
        rows: by the tensor's name.
        config: in place of the checkpoint's.
    """

    def __init__(self, checkpoint, rows: Mapping[str, Rows], config: dict | None = None):
        super().__init__(checkpoint, {name: (checkpoint, name) for name in checkpoint.tensors}, config)
        self._rows = dict(rows)
        sources = [source for places in rows.values() for source, _ in places.sources]
        self.is_planned |= any(getattr(source, "is_planned", False) for source in sources)
        for name, places in self._rows.items():
            info = self.tensors[name]
            self.tensors[name] = replace(info, shape=(len(places.owner), *info.shape[1:]), offset=0)
        self._means: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> Array:
        info = self.tensors[name]
        return self.read_run(name, 0, info.numel).reshape(info.shape)

    def read_run(self, name: str, begin: int, end: int) -> Array:
        """Elements [begin, end) in order; no more than these, and what stands in their rows, is gathered."""
        places = self._rows.get(name)
        if places is None:
            return super().read_run(name, begin, end)
        width = self._width(name)
        first, stop = begin // width, -(-end // width)
        owner, moved = _straight(places, first, stop)
        dtype = self.tensors[name].dtype
        if owner is not None:
            source, old = places.sources[owner]
            if source.tensors[old].dtype == dtype:
                return source.read_run(old, begin + moved * width, end + moved * width)
        found = np.empty((stop - first, width), dtype)
        step = max(1, AT_ONCE // width)
        for at in range(first, stop, step):
            self._gather(name, at, found[at - first : min(at + step, stop) - first])
        found.flags.writeable = False
        return found.reshape(-1)[begin - first * width : end - first * width]

    def nbytes_made(self, name: str) -> int:
        places = self._rows.get(name)
        if places is None:
            return super().nbytes_made(name)
        owner, _ = _straight(places, 0, len(places.owner))
        made = self.tensors[name].nbytes if owner is None else 0
        return made + sum(source.nbytes_made(old) for source, old in places.sources)

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        if name not in self._rows:
            super().prefetch(name, begin, end)
            return
        for source, old in self._rows[name].sources:
            source.prefetch(old)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        if name not in self._rows:
            super().release(name, begin, end)

    def _width(self, name: str) -> int:
        return prod(self.tensors[name].shape[1:])

    def _gather(self, name: str, first: int, out: np.ndarray, with_mean: bool = True) -> None:
        """Fill [rows, width] with the rows from `first` on; those that are their mean only `with_mean`."""
        places, stop = self._rows[name], first + len(out)
        owner, row = places.owner[first:stop], places.row[first:stop]
        for k, (source, old) in enumerate(places.sources):
            mine = np.flatnonzero(owner == k)
            if mine.size:
                _put(_rows_of(source, old, row[mine], out.shape[1]), out, mine)
        out[owner == ZERO] = 0
        for i in np.flatnonzero(owner == AVERAGE):
            rows = [self._row(name, k, number) for k, number in places.averages[first + int(i)]]
            store(sum(rows) / len(rows), out[i])
        padded = np.flatnonzero(owner == MEAN)
        if padded.size and with_mean:
            out[padded] = self._mean(name)

    def _row(self, name: str, k: int, number: int) -> np.ndarray:
        source, old = self._rows[name].sources[k]
        width = self._width(name)
        return source.read_run(old, number * width, (number + 1) * width).astype(np.float64)

    def _mean(self, name: str) -> np.ndarray:
        with self._lock:
            if name not in self._means:
                self._means[name] = self._mean_of_rows(name)
            return self._means[name]

    def _mean_of_rows(self, name: str) -> np.ndarray:
        counted = self._rows[name].owner != MEAN
        width, dtype = self._width(name), self.tensors[name].dtype
        step, total = max(1, AT_ONCE // width), np.zeros(width)
        for first in range(0, len(counted), step):
            theirs = counted[first : first + step]
            self._gather(name, first, rows := np.empty((len(theirs), width), dtype), with_mean=False)
            total += rows[theirs].astype(np.float64).sum(0)
        store(total / max(1, int(counted.sum())), mean := np.empty(width, dtype))
        return mean


def _straight(places: Rows, first: int, stop: int) -> tuple[int | None, int]:
    """The source that rows [first, stop) are a run of, and how far they are moved there; None if there is none."""
    owner, row = places.owner[first:stop], places.row[first:stop]
    if not len(owner) or owner[0] < 0 or (owner != owner[0]).any() or (np.diff(row) != 1).any():
        return None, 0
    return int(owner[0]), int(row[0]) - first


def _rows_of(source, name: str, rows: np.ndarray, width: int) -> np.ndarray:
    """[len(rows), width]: rows of a tensor of a checkpoint."""
    if not source.nbytes_made(name):
        return source.read(name).reshape(-1, width)[rows]
    # computed when it is read: no more than these rows
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = [source.read_run(name, int(run[0]) * width, (int(run[-1]) + 1) * width) for run in np.split(rows, cuts)]
    return np.concatenate(runs).reshape(-1, width)


def _put(values: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
    if values.dtype != out.dtype:
        wide = values.astype(np.float64)
        store(wide, values := np.empty(values.shape, out.dtype))
    out[rows] = values
