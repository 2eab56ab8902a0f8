"""A function of the user's own as a router, its answers checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from freemerge.errors import InputError
from freemerge.routers.assignment import Assignment, checked_assignment, checked_names, spread
from freemerge.routers.features import rows_of_batch
from freemerge.routers.router import check_attached


class FunctionRouter:
    """A function from a batch to an assignment: names or None for each row, or [rows, experts] weights.

    Args:
        function: called with what a model is called with.
        experts: names it may answer, in the order of the weights' columns.
    """

    def __init__(self, function: Callable[[Any], Any], experts: Sequence[str]):
        if not callable(function):
            raise InputError(f"a router is a function from a batch to an assignment, not {function!r}")
        self.function, self.experts = function, checked_names(experts)

    def __call__(self, batch: Any) -> Assignment:
        """Raises InputError for an unknown name, NaN or Inf, another number of rows or experts."""
        return checked_assignment(self.function(batch), self.experts, rows_of_batch(batch))

    def bind(self, model: Any) -> Callable[[Any], Assignment]:
        """The router for a model with experts attached. Raises InputError where it has not all of the router's."""
        return _BoundFunction(self, check_attached(self.experts, model))

    def save(self, folder: Any, **options: Any) -> None:
        raise InputError("a function cannot be saved in a file; save what it is made from")


@dataclass(frozen=True)
class _BoundFunction:
    router: FunctionRouter
    attached: tuple[str, ...]

    def __call__(self, batch: Any) -> Assignment:
        return spread(self.router(batch), self.router.experts, self.attached)
