"""The route of any module: run again for the rows of each expert, with that expert's tensors (replay.py)."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from freemerge.attached import replay
from freemerge.attached.active import STATES, Active, Work
from freemerge.attached.assignment import Assignment
from freemerge.attached.route import Path, Route, rows_first
from freemerge.errors import InputError
from freemerge.parts import Part, Rows


class ReplayRoute(Route):
    """Any module, run again for the rows of each mixture of experts.

    Args:
        taken: routes of children whose tensors the module may take without calling them, by path. Where it did, these
            tensors are its own.
    """

    def __init__(
        self, attachment: Any, label: str, names: Mapping[Path, str], taken: Mapping[Path, Route] = MappingProxyType({})
    ):
        super().__init__(attachment, label, names)
        self.taken = dict(taken)

    def touches(self, work: Work) -> bool:
        return super().touches(work) or any(route.touches(work) for route in self.taken.values())

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        called = STATES.get()[id(self.attachment)].called
        taken = {path: route for path, route in self.taken.items() if route not in called}
        called.difference_update(self.taken.values())
        names = self.names | {(*path, *n): name for path, route in taken.items() for n, name in route.names.items()}
        used = {e for name in names.values() for e, _, _ in self.parts(work, name)}
        if not used:
            return None
        x = replay.first_tensor(args, kwargs)
        if x is None:
            raise InputError(f"{self.label} is called without a tensor: its own tensors cannot be routed")
        _check_mask(module, args, kwargs, self.label)
        replay.check_stateless(args, kwargs, self.label)
        n = len(x) if not x.is_nested and len(x) == 1 else len(rows_first(work, x, self.label))
        index = self.mixture_of_rows(work, n)
        shared = n == 1 < len(index)
        for u, mixture in enumerate(work.mixtures):
            rows = np.flatnonzero(index == u)
            if not len(rows) or not any(mixture[e] for e in used):
                continue
            rows = torch.as_tensor(rows, device=x.device)
            given = (args, dict(kwargs)) if shared else replay.select((args, dict(kwargs)), rows, n)
            with uniform(self.attachment, mixture, {self, *taken.values()}):
                part = replay.run(self.twin(work, module, u, names), *given)
            output = replay.put_rows(output, part, rows, len(index) if shared else n, self.label)
        return output

    def parts(self, work: Work, name: str | None) -> list[tuple[int, Part, float]]:
        """Without those that change nothing (a tensor that no expert trained): running again is not free."""
        key = "changing parts", name
        if key not in work.known:
            work.known[key] = [found for found in super().parts(work, name) if not _is_nothing(found[1])]
        return work.known[key]

    def twin(self, work: Work, module: Any, u: int, names: Mapping[Path, str]) -> Any:
        """`module` with the tensors of one mixture of experts."""
        return replay.twin_of(module, {path: self.mixed(work, name)[u] for path, name in names.items()})

    def mixture_of_rows(self, work: Work, n: int) -> np.ndarray:
        """Which mixture each of the first dimension's `n` has; where it is 1 for all, each of the batch's rows."""
        assignment = work.assignment
        if assignment.tokens is not None and n != len(work.mixture_of):
            by_row = work.mixture_of.reshape(-1, assignment.tokens)
            if (by_row != by_row[:, :1]).any():
                raise InputError(f"{self.label} mixes tokens: assign experts to rows, not to tokens")
            groups = by_row[:, 0]
        else:
            groups = work.mixture_of
        if n != 1 and n % len(groups):
            raise InputError(f"{self.label} was given {n} rows, the assignment has {len(groups)}")
        return np.repeat(groups, max(1, n // len(groups)))


class uniform:
    """Forwards in this context have one mixture of experts for all rows; what `routes` route is left alone."""

    def __init__(self, attachment: Any, mixture: np.ndarray, routes: Iterable[Route]):
        self._state = Active(Assignment(mixture[None]), replaying=frozenset(routes))
        self._key = id(attachment)

    def __enter__(self) -> None:
        self._token = STATES.set({**STATES.get(), self._key: self._state})

    def __exit__(self, *_: object) -> None:
        STATES.reset(self._token)


def _is_nothing(part: Part) -> bool:
    """Whether it changes nothing: zeros, of which looking at one mostly tells."""
    return isinstance(part, Rows) and part.start is None and not (part.values[:1].any() or part.values.any())


def _check_mask(module: Any, args: tuple, kwargs: Mapping[str, Any], label: str) -> None:
    if isinstance(module, nn.MultiheadAttention):
        mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)
        if mask is not None and mask.ndim == 3:
            raise InputError(f"{label} has a mask for each head and row, which cannot be routed; give key_padding_mask")
