"""Which experts each row, or each token, of a batch uses."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsFloat

import numpy as np

from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import InputError


@dataclass(frozen=True)
class Assignment:
    """Weights of experts.

    Args:
        weights: float32 [rows, E], or [rows, tokens, E] where each token has its own; finite.
        copies: rows of the batch that follow one another and share a row of weights (the beams of a prompt).
        for_all: whether the one row there is holds for all of any batch.
    """

    weights: np.ndarray
    copies: int = 1
    for_all: bool = False

    @property
    def rows(self) -> int:
        """Of the batch; 1 for a batch of any size whose rows are treated alike."""
        return len(self.weights) * (self.copies if len(self.weights) > 1 else 1)

    @property
    def tokens(self) -> int | None:
        """Of a row, where each has weights of its own."""
        return self.weights.shape[1] if self.weights.ndim == 3 else None

    @cached_property
    def groups(self) -> np.ndarray:
        """[G, E]: a batch's tokens in order, cut into G runs of one length, have these weights."""
        return np.ascontiguousarray(np.repeat(self.weights, self.copies if self.rows > 1 else 1, axis=0)).reshape(
            -1, self.weights.shape[-1]
        )

    def check_batch(self, rows: int) -> None:
        """Raise InputError where a batch has another number of rows."""
        expected = len(self.weights) * self.copies
        if rows != expected and not self.for_all:
            copies = f" with {self.copies} copies each" if self.copies > 1 else ""
            raise InputError(
                f"the assignment is for {len(self.weights)} rows{copies}, the batch has {rows}"
                + ("; where a prompt has several beams or sequences, say copies=..." if rows % expected == 0 else "")
            )

    def check_input(self, shape: Sequence[int], where: str) -> None:
        """Raise InputError where an input of a module, [..., width], cannot be cut into the groups."""
        if self.rows == 1 and self.tokens is None:
            return
        if self.tokens is None:
            fits = shape[0] % self.rows == 0
        else:
            fits = tuple(shape[:2]) == (self.rows, self.tokens) or shape[0] == self.rows * self.tokens
        if not fits:
            each = "" if self.tokens is None else f" of {self.tokens} tokens"
            raise InputError(
                f"{where} was given {list(shape)}, which are not {self.rows} rows{each} in the first dimension"
                + ("s: assign rows, not tokens, where a model is called with part of them" if each else "")
            )


def read_assignment(given: Any, experts: Sequence[str], copies: int = 1) -> Assignment:
    """What a user or a router gives, checked.

    Args:
        given: for each row (or a row's list, for each of its tokens) the name of an expert, its index, or None (-1)
            for the backbone alone, or a mapping of names to weights; or numbers [rows, E] or [rows, tokens, E], in
            the order of `experts`, as an array or a tensor. One name or None holds for all rows.
        copies: see Assignment.

    Raises:
        InputError: an unknown expert, a NaN or Inf, or what is none of these.
    """
    if type(copies) is not int or copies < 1:
        raise InputError(f"copies {copies!r}: a whole number of at least 1")
    if given is None or isinstance(given, (str, Mapping)):
        return Assignment(_from_names([given], experts), copies, for_all=True)
    if isinstance(given, np.ndarray) and given.dtype.kind in "OU":  # names
        given = given.tolist()
    if isinstance(given, np.ndarray) or is_torch(given):
        return Assignment(_from_numbers(_on_host(given), experts), copies)
    if not isinstance(given, Sequence) or not len(given):
        raise InputError(f"an assignment is a list with an expert for each row, or weights, not {_shown(given)}")
    if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in _leaves(given)):
        return Assignment(_from_numbers(_array(given), experts), copies)
    return Assignment(_from_names(given, experts), copies)


def unknown(name: Any, experts: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), experts, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no expert {name!r}: there are {', '.join(experts)}{hint}"


def _on_host(given: Any) -> np.ndarray:
    if not is_torch(given):
        return given
    given = given.detach().cpu()
    return from_torch(given.float() if given.is_floating_point() else given)


def _array(given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError:
        raise InputError("the rows of an assignment differ in length") from None


def _leaves(given: Any):
    for item in given:
        if isinstance(item, Sequence) and not isinstance(item, str):
            yield from _leaves(item)
        else:
            yield item


def _from_numbers(given: np.ndarray, experts: Sequence[str]) -> np.ndarray:
    if given.dtype.kind in "iu" and given.ndim in (1, 2) and given.size:
        return _from_indices(given.astype(np.int64), experts)
    weights = np.asarray(given, np.float32) if given.dtype.kind in "fV" else None
    if weights is None or weights.ndim not in (2, 3) or weights.shape[-1] != len(experts) or not weights.size:
        raise InputError(
            f"an assignment of numbers is [rows, {len(experts)}] or [rows, tokens, {len(experts)}] weights, or whole "
            f"numbers [rows] or [rows, tokens], not {given.dtype} {list(given.shape)}"
        )
    if not np.isfinite(weights).all():
        rows = np.flatnonzero(~np.isfinite(weights).reshape(len(weights), -1).all(axis=1))
        raise InputError(f"NaN or Inf in the weights of row {', '.join(map(str, rows[:8]))}")
    return np.array(weights)


def _from_indices(index: np.ndarray, experts: Sequence[str]) -> np.ndarray:
    wrong = index[(index < -1) | (index >= len(experts))]
    if wrong.size:
        raise InputError(f"no expert {wrong.flat[0]}: there are {len(experts)}, and -1 for the backbone alone")
    # the last row is no expert's, and is what -1 finds
    return np.eye(len(experts) + 1, len(experts), dtype=np.float32)[index]


def _from_names(given: Sequence, experts: Sequence[str]) -> np.ndarray:
    if any(isinstance(row, Sequence) and not isinstance(row, str) for row in given):
        if len({len(row) if isinstance(row, Sequence) and not isinstance(row, str) else -1 for row in given}) > 1:
            raise InputError("the rows of an assignment differ in length")
        return np.stack([_from_names(row, experts) for row in given])
    weights = np.zeros((len(given), len(experts)), np.float32)
    for row, item in zip(weights, given, strict=True):
        for name, weight in _mixture(item, experts).items():
            if name not in experts:
                raise InputError(unknown(name, experts))
            if isinstance(weight, (str, bytes)) or not isinstance(weight, SupportsFloat):
                raise InputError(f"the weight of {name!r} is {weight!r}, not a number")
            row[list(experts).index(name)] = weight
    if not np.isfinite(weights).all():
        raise InputError("NaN or Inf in the weights of an assignment")
    return weights


def _mixture(item: Any, experts: Sequence[str]) -> Mapping[Any, Any]:
    """Weights by name of what is given for a row."""
    if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
        (row,) = _from_indices(np.array([item]), experts)
        return dict(zip(experts, row, strict=True))
    return item if isinstance(item, Mapping) else {} if item is None else {item: 1.0}


def _shown(given: Any) -> str:
    return repr(given)[:60]
