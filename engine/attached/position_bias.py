"""T5's relative position bias, routed: one answer for the whole batch becomes one for each row."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from freemerge.attached.active import Work
from freemerge.attached.replay_route import ReplayRoute
from freemerge.attached.route import learns_nothing

EMBEDDING = "relative_attention_bias"
METHODS = ("compute_bias", "compute_position_bias")


def computes_bias(module: Any) -> bool:
    """Whether a module makes a bias of attention scores from an embedding of distances: T5's and its kin's."""
    return _method(module) is not None and isinstance(getattr(module, EMBEDDING, None), torch.nn.Embedding)


def _method(module: Any) -> str | None:
    return next((name for name in METHODS if hasattr(type(module), name)), None)


class PositionBiasRoute(ReplayRoute):
    """In the place of the module's method while somebody routes: no module answers the bias, so no hook sees it.

    [1, heads, queries, keys] becomes [rows, heads, queries, keys], which the layers after add to their scores alike.
    """

    def install(self, module: Any) -> "_Method":
        return _Method(self, module)

    def biases(self, module: Any, work: Work, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        compute = getattr(type(module), _method(module))
        backbone = compute(module, *args, **kwargs)
        if not self.touches(work):
            return backbone
        found = torch.stack(
            [compute(self.twin(work, module, u, self.names), *args, **kwargs) for u in range(len(work.mixtures))]
        )
        index = torch.as_tensor(self.mixture_of_rows(work, work.assignment.rows), device=backbone.device)
        row = 0 if backbone.shape[0] == 1 else torch.arange(len(backbone), device=backbone.device)
        return learns_nothing(backbone, found[index, row])


class _Method:
    """The method of one module, and the handle that takes it away."""

    def __init__(self, route: PositionBiasRoute | None, module: Any):
        self._route, self._module = route, module
        setattr(module, _method(module), self)

    def remove(self) -> None:
        delattr(self._module, _method(self._module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work = self._route and self._route.work()
        if work is None:
            return getattr(type(self._module), _method(self._module))(self._module, *args, **kwargs)
        return self._route.biases(self._module, work, args, kwargs)

    def __deepcopy__(self, memo: dict) -> "_Method":
        return _Method(None, copy.deepcopy(self._module, memo))  # a copy made in a routed context is not in one
