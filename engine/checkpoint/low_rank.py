"""What a LoRA adapter does to one tensor: W' = W + scaling * B A, and DoRA's rescaling; in blocks of rows.

Source: arXiv:2106.09685 (LoRA), arXiv:2402.09353 (DoRA); github.com/huggingface/peft, src/peft/tuners/lora (0.21).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from freemerge.kernels.array import Array, store
from freemerge.kernels.weighted_sum import weighted_sum

# Elements computed at once. The grid of blocks depends on the tensor's shape alone, as the last bit of a product can
# depend on how many rows are multiplied.
BLOCK = 256 << 10


@dataclass(frozen=True)
class LowRank:
    """tensor + scaling * left @ right, the tensor seen as a matrix [H, W]: its first side, and all others.

    Args:
        read: name -> array, of the adapter.
        a, b: names of A [r, in, ...] and B [out, r, ...]. Without `a`, `b` is a vector to add, [out].
        transposed: whether the tensor is [in, out] and not [out, in, ...].
        magnitude: name of DoRA's magnitudes: the norms that the weights of each output are scaled to have.
    """

    read: Callable[[str], Array]
    a: str | None
    b: str
    scaling: float
    transposed: bool = False
    magnitude: str | None = None

    def factors(self, dtype: np.dtype) -> tuple[Array, Array]:
        """left [H, r] and right [r, W]."""
        b = self.read(self.b).astype(dtype, copy=False)
        if self.a is None:
            return b.reshape(-1, 1), np.ones((1, 1), dtype)
        a = self.read(self.a).astype(dtype, copy=False)
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        return (a.T, b.T) if self.transposed else (b, a)

    def magnitudes(self, dtype: np.dtype) -> Array:
        """[out]"""
        return self.read(self.magnitude).astype(dtype, copy=False).reshape(-1)


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor: `read()` takes the place of the base's, if there is one, then come the updates."""

    read: Callable[[], Array] | None = None
    updates: tuple[LowRank, ...] = ()

    def then(self, later: "Change") -> "Change":
        return later if later.read else replace(self, updates=self.updates + later.updates)


class Changed:
    """A tensor with its updates in it, made when it is asked for.

    Args:
        start: the tensor without them, of any shape and float dtype.
        dtype: of the result.
        norms: kept for DoRA's transposed tensors, whose norms take a pass of their own: index of an update -> [W].
    """

    def __init__(self, start: Array, updates: tuple[LowRank, ...], dtype: np.dtype, norms: dict[int, Array]):
        self._precision = np.dtype(np.float64 if start.dtype == np.float64 else np.float32)
        self._height = len(start)
        self._matrix = start.reshape(self._height, -1)
        self._updates, self._dtype, self._norms = updates, dtype, norms
        self._factors = [update.factors(self._precision) for update in updates]
        self._step = max(1, BLOCK // max(1, self._matrix.shape[1]))

    def elements(self, begin: int, end: int) -> Array:
        """Elements [begin, end) in order; each was computed in float32 (or float64) and rounded once."""
        width = self._matrix.shape[1]
        first = begin // width // self._step * self._step
        last = min(self._height, -(-end // (width * self._step)) * self._step)
        out = np.empty((last - first, width), self._dtype)
        for row in range(first, last, self._step):
            self._rows(row, len(self._updates), out[row - first : row - first + self._step])
        return out.reshape(-1)[begin - first * width : end - first * width]

    def _rows(self, row: int, count: int, out: Array) -> None:
        """Write the block of rows from `row` on, with the first `count` updates, rounded to the dtype of `out`."""
        rows = slice(row, row + len(out))
        found = self._matrix[rows]
        for index, update in enumerate(self._updates[:count]):
            last = index == count - 1 and update.magnitude is None
            found = self._updated(index, found, rows, out if last else np.empty(out.shape, self._precision))
            if update.magnitude is not None:
                found *= self._rescaling(index, found, rows)
        if found is not out:
            store(found.astype(self._precision, copy=False), out)

    def _updated(self, index: int, values: Array, rows: slice, out: Array) -> Array:
        """`out` with the values of these rows and an update, without DoRA's rescaling."""
        scaling, (left, right) = self._updates[index].scaling, self._factors[index]
        if self._precision == np.float64:
            store(values + scaling * (left[rows] @ right), out)
        else:
            weighted_sum([values, left[rows] @ right], [1.0, scaling], out=out)
        return out

    def _rescaling(self, index: int, found: Array, rows: slice) -> Array:
        update = self._updates[index]
        wanted = update.magnitudes(self._precision)
        if update.transposed and index not in self._norms:
            self._norms[index] = self._norms_of_columns(index)
        with np.errstate(divide="ignore", invalid="ignore"):  # of zeros: what is not finite is found in the result
            if update.transposed:
                return wanted / self._norms[index]
            norms = np.sqrt(np.square(found, dtype=np.float64).sum(1)).astype(self._precision)
            return (wanted[rows] / norms)[:, None]

    def _norms_of_columns(self, index: int) -> Array:
        squares = np.zeros(self._matrix.shape[1], np.float64)
        for row in range(0, self._height, self._step):
            rows = slice(row, min(row + self._step, self._height))
            found = np.empty((rows.stop - row, self._matrix.shape[1]), self._precision)
            self._rows(row, index, found)
            squares += np.square(self._updated(index, found, rows, found), dtype=np.float64).sum(0)
        return np.sqrt(squares).astype(self._precision)
