"""`with model.routed(Gates()):` linear layers whose tokens pick their experts by the layer's gate.

What it computes is written down in NumPy in freemerge.experts.routed_layer. Sums are float32 (float64 where the model
is), rounded once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from freemerge.attached.gates import REMEDY, Gates, GateSet
from freemerge.attached.products import add_chosen, columns_of
from freemerge.attached.replay_route import ReplayRoute
from freemerge.attached.route import Path, Route
from freemerge.attached.routes import LinearRoute
from freemerge.errors import InputError, listed
from freemerge.kernels.array import Array, is_tensor
from freemerge.top_k import keep_top_k

WEIGHT, BIAS = ("weight",), ("bias",)
UNSEEN = "a gate needs what its layer is given"


@dataclass(frozen=True)
class GatedLinear:
    """An nn.Linear whose tokens pick their experts.

    Args:
        attachment: whose experts these are.
        weight, bias: the experts' names of its tensors; no bias where none of them changes it.
    """

    attachment: Any
    weight: str
    bias: str | None
    top_k: int

    def answer(self, x: Any, output: Any) -> Any:
        """[..., H] like `output`, what the backbone makes of `x` [..., W]."""
        found, derived = self.attachment.found, self.attachment.derived
        tokens = x.detach().reshape(-1, x.shape[-1]).float()
        lines = output.detach().reshape(-1, output.shape[-1])
        total = lines.clone() if lines.dtype == torch.float64 else lines.float()
        experts = found.gates.experts
        weights = gate_weights(tokens, found.gate(self.weight, output), len(experts), self.top_k)
        held = [t for t, expert in enumerate(experts) if self.weight in found.experts[expert].tensors]
        parts = [derived.part(experts[t], self.weight) for t in held]
        add_chosen(tokens, total, parts, columns_of(weights, held))
        if self.bias:
            total += weights @ derived.added(self.bias, experts)
        return total.to(output.dtype).view(output.shape)


def gate_weights(tokens: Any, gate: Any, experts: int, top_k: int) -> Any:
    """[n, T]: the top_k of the softmax of how long each token [n, W] is in each expert's directions [T * r, W]."""
    along = (tokens @ gate.T).view(len(tokens), experts, -1)
    return keep_top_k(torch.linalg.vector_norm(along, dim=-1).softmax(-1), top_k)


class GatedLayers:
    """The linear layers of a model that have a gate. All other modules stay the backbone's, as in the official code.

    Args:
        routes: of every module with a tensor that an expert changes, see routing.make_routes.

    Raises:
        InputError: there are no gates, or they do not fit the model: all problems at once.
    """

    def __init__(self, attachment: Any, routes: Sequence[tuple[Any, Route]], gates: Gates):
        found: GateSet | None = attachment.found.gates
        if found is None:
            raise InputError(f"{attachment.found.label}: these experts have no gates. {REMEDY}")
        top_k = found.top_k_for(gates, attachment.found.experts)
        changed = {name for expert in found.experts for name in attachment.found.experts[expert].tensors}
        problems = [problem for module, route in routes for problem in _problems(module, route, found, changed)]
        if problems:
            raise InputError(listed(problems, REMEDY, outcome="nothing was run"))
        self._layers = {
            id(module): GatedLinear(attachment, route.names[WEIGHT], route.names.get(BIAS), top_k)
            for module, route in routes
            if route.names.get(WEIGHT) in found.arrays and _is_linear(module)
        }

    def answer(self, module: Any, x: Any, output: Any) -> Any:
        """Instead of `output`, the backbone's; None for a module without a gate."""
        layer = self._layers.get(id(module))
        return None if layer is None else layer.answer(x, output)


def _problems(module: Any, route: Route, found: GateSet, changed: Collection[str]) -> Iterator[str]:
    """Args: `changed` are the tensors that experts with gates change; others may be attached beside them."""
    names = {path: name for path, name in route.names.items() if name in changed and _is_linear(_owner(module, path))}
    for path, name in names.items():
        gate = found.arrays.get(route.names.get((*path[:-1], "weight")))
        if gate is None:
            yield f"{name}: there is no gate of {route.label}"
        elif not isinstance(route, LinearRoute) or not isinstance(module, nn.Linear):
            yield f"{name}: {UNSEEN}, which {route.label} does not show"
        elif path == WEIGHT and (problem := _unfit(gate, len(found.experts), module.in_features)):
            yield f"the gate of {name}: {problem}"
    if isinstance(route, ReplayRoute):
        taken = {name for child in route.taken.values() for name in child.names.values()}
        yield from (f"{name}: {UNSEEN}, which {route.label} may take past it" for name in taken & found.arrays.keys())


def _owner(module: Any, path: Path) -> Any:
    return module.get_submodule(".".join(path[:-1]))


def _unfit(gate: Array, experts: int, width: int) -> str | None:
    if len(gate.shape) != 2 or gate.shape[0] % experts or gate.shape[1] != width:
        return f"{list(gate.shape)}, expected are [a multiple of {experts} experts, {width}]"
    finite = gate.isfinite() if is_tensor(gate) else np.isfinite(gate)
    return None if bool(finite.all()) else "NaN or Inf"


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
