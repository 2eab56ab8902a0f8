"""What a forward that is routed knows: the assignment of its rows, and what was worked out for it so far."""

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from freemerge.attached.assignment import Assignment
from freemerge.attached.in_place import on_host
from freemerge.checkpoint.torch_arrays import is_torch, to_torch
from freemerge.kernels.array import Array

# Attachment (by id) -> its state, for the code that runs in a `with model.routed(...)`: other threads see their own
STATES: ContextVar[Mapping[int, "Active"]] = ContextVar("freemerge routed", default=MappingProxyType({}))


class Active:
    """An assignment at work.

    Args:
        assignment: what it is, or None where a router answers for each batch.
        router: (batch) -> what read_assignment takes; `copies` as there.
        gates: what linear layers pick experts by, instead of an assignment.
        replaying: routes of the module that is being run again for some rows, which leave it alone.
    """

    def __init__(
        self,
        assignment: Assignment | None,
        *,
        router: Callable | None = None,
        copies: int = 1,
        gates: Any = None,
        replaying: frozenset = frozenset(),
    ):
        self.gates = gates
        self.router, self.copies, self.replaying = router, copies, replaying
        self._mine = threading.local()  # threads that share a context may run batches of their own
        self._fixed = None if assignment is None else Work(assignment)

    @property
    def work(self) -> "Work | None":
        return getattr(self._mine, "encoding", None) or self._fixed or getattr(self._mine, "work", None)

    def route(self, assignment: Assignment) -> None:
        self._mine.work = Work(assignment)

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A forward of the whole model, or of its encoder alone, with these arguments."""
        self._mine.encoding = None
        self.called.clear()
        self._mine.given = {t.untyped_storage().data_ptr() for t in batch.values() if is_torch(t)}

    @property
    def called(self) -> set:
        """Routes whose module was called, until the module around it is done; see ReplayRoute."""
        return self._mine.__dict__.setdefault("called", set())

    def encode(self, assignment: Assignment | None) -> None:
        """The encoder runs alone, with this assignment; None: it is done."""
        self._mine.encoding = None if assignment is None else Work(assignment)

    def was_given(self, tensor: Any) -> bool:
        """Whether a tensor is (a view of) one that the model was called with."""
        return tensor.untyped_storage().data_ptr() in getattr(self._mine, "given", ())


class Work:
    """An assignment with what follows from it, worked out once for all layers and steps."""

    def __init__(self, assignment: Assignment):
        self.assignment = assignment
        self.known: dict[Any, Any] = {}  # what routes remember
        self._placed: dict[tuple, Any] = {}

    def weights(self, tensor: Any) -> Array:
        """[G, E] as ops take them, where `tensor` lies."""
        return self.groups if on_host(tensor) else self.placed("groups", tensor)

    def placed(self, name: str, tensor: Any) -> Any:
        """An array of this as a tensor where `tensor` lies; it goes there once, as a GPU is waited for meanwhile."""
        key = name, tensor.device
        if key not in self._placed:
            self._placed[key] = to_torch(getattr(self, name)).to(tensor.device)
        return self._placed[key]

    @property
    def groups(self) -> np.ndarray:
        """[G, E]: the assignment's."""
        return self.assignment.groups

    @cached_property
    def mixtures(self) -> np.ndarray:
        """[U, E]: the different rows of weights there are."""
        return self._unique[0]

    @cached_property
    def mixture_of(self) -> np.ndarray:
        """[G]: which of them each group has."""
        return self._unique[1]

    @cached_property
    def touched(self) -> np.ndarray:
        """The groups that have any expert, in order."""
        return np.flatnonzero(self.groups.any(axis=1))

    @cached_property
    def chosen(self) -> np.ndarray | None:
        """[U]: the expert each mixture consists of, E where it is the backbone alone; None where there are others."""
        mixtures = self.mixtures
        if not ((mixtures == 0) | (mixtures == 1)).all() or (mixtures.sum(axis=1) > 1).any():
            return None
        return np.where(mixtures.any(axis=1), mixtures.argmax(axis=1), mixtures.shape[1])

    @cached_property
    def used(self) -> np.ndarray:
        """[E]: whether any row uses an expert."""
        return self.mixtures.any(axis=0)

    @cached_property
    def _unique(self) -> tuple[np.ndarray, np.ndarray]:
        found, index = np.unique(self.groups, axis=0, return_inverse=True)
        return found, index.reshape(-1)
