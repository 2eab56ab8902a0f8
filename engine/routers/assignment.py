"""Which expert each row of a batch uses: names, or weights.

An assignment is either a list with an expert's name or None (the backbone alone) for each row, or [rows, experts]
weights, by which the experts' parts are summed; a row of zeros is the backbone alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from freemerge.attached.assignment import unknown
from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import InputError
from freemerge.top_k import keep_top_k

Assignment: TypeAlias = "list[str | None] | np.ndarray"


def checked_names(experts: Iterable[str]) -> tuple[str, ...]:
    """Names of experts in their order. Raises InputError where there are none, or one is none or stands twice."""
    if isinstance(experts, str):
        raise InputError(f"experts: a list of names is needed, not the one name {experts!r}")
    names = tuple(experts)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    twice = sorted({name for name in names if names.count(name) > 1} if not wrong else ())
    if not names or wrong or twice:
        what = f"{wrong[0]!r} is no name" if wrong else f"{', '.join(twice)} twice" if twice else "none given"
        raise InputError(f"experts of a router: {what}")
    return names


def choose(probabilities: np.ndarray, experts: Sequence[str], top_k: int | None, threshold: float) -> Assignment:
    """The assignment for [rows, T] probabilities.

    Args:
        top_k: 1 answers names; else weights, those of the k most probable divided by their sum, or with None of all.
            Among equals the first expert wins.
        threshold: rows whose largest probability is below it get the backbone alone.
    """
    keeps = probabilities.max(axis=1, initial=0.0) >= threshold
    if top_k == 1:
        return [experts[i] if keep else None for i, keep in zip(probabilities.argmax(axis=1), keeps, strict=True)]
    weights = np.where(keeps[:, None], probabilities, 0.0)
    if top_k is not None and top_k < len(experts):
        weights = keep_top_k(weights, top_k)
    return weights.astype(np.float32)


def spread(assignment: Assignment, experts: Sequence[str], attached: Sequence[str]) -> Assignment:
    """An assignment over `experts` as one over `attached`, which has them all, in an order of its own, and others."""
    if isinstance(assignment, list) or tuple(experts) == tuple(attached):
        return assignment
    weights = np.zeros((len(assignment), len(attached)), np.float32)
    weights[:, [list(attached).index(name) for name in experts]] = assignment
    return weights


def checked_assignment(answer: Any, experts: Sequence[str], rows: int | None = None) -> Assignment:
    """What a function of the user's own answered, as an assignment.

    Args:
        answer: names or None for each row, or [rows, experts] numbers (array or tensor).
        rows: how many there must be; any number unless given.

    Raises:
        InputError: an unknown name, a NaN or Inf, another number of rows or of experts.
    """
    if is_torch(answer):
        answer = from_torch(answer.float().cpu())
    if isinstance(answer, (str, Mapping)) or not hasattr(answer, "__len__"):
        raise InputError(f"a router answers a name for each row or [rows, experts] weights, not {answer!r}")
    if len(answer) and not isinstance(answer, np.ndarray) and all(n is None or isinstance(n, str) for n in answer):
        strange = [name for name in answer if name is not None and name not in experts]
        if strange:
            raise InputError(f"the router answered {unknown(strange[0], experts)}")
        found: Assignment = list(answer)
    else:
        found = _checked_weights(answer, experts)
    if rows is not None and len(found) != rows:
        raise InputError(f"the router answered for {len(found)} rows, the batch has {rows}")
    return found


def _checked_weights(answer: Any, experts: Sequence[str]) -> np.ndarray:
    try:
        weights = np.asarray(answer, np.float32)
    except (TypeError, ValueError):
        raise InputError("the router answered neither names nor [rows, experts] weights") from None
    if weights.size == 0 and weights.ndim == 1:
        return weights.reshape(0, len(experts))
    if weights.ndim != 2 or weights.shape[1] != len(experts):
        raise InputError(f"the router answered weights {list(weights.shape)}, expected are [rows, {len(experts)}]")
    bad = np.flatnonzero(~np.isfinite(weights).all(axis=1))
    if len(bad):
        raise InputError(f"the router answered NaN or Inf for {shown_rows(bad)}")
    return weights


def shown_rows(rows: Sequence[int]) -> str:
    numbers = ", ".join(str(int(row)) for row in rows[:8])
    return f"{'row' if len(rows) == 1 else 'rows'} {numbers}" + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
