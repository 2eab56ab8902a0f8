"""The experts that can be attached to a model: each part brought to where it is needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freemerge.attached.adapters import AdapterExpert
from freemerge.attached.assignment import unknown
from freemerge.attached.gates import GateSet
from freemerge.attached.in_place import as_host, moved
from freemerge.attached.places import Place, find_places
from freemerge.checkpoint.torch_arrays import as_tensor
from freemerge.errors import CheckpointError, InputError, listed
from freemerge.parts import Part


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one backbone, by name.

    Args:
        label: where they are from, for messages.
        experts: each a sidecar.Expert or a memory.MemoryExpert (an adapters.AdapterExpert is one).
        manifest: freemerge.json of the backbone, where there is one.
        gates: what their layers have to pick them by, where they share some.
    """

    label: str
    experts: Mapping[str, Any]
    manifest: Mapping[str, Any] | None = None
    gates: GateSet | None = None
    _on_devices: dict = field(default_factory=dict)

    def places(self, model: Any) -> dict[str, Place]:
        """Where every tensor that an expert changes lies in `model`. Raises InputError, see find_places."""
        experts = self.experts.values()
        of_checkpoint = _shapes(expert for expert in experts if not isinstance(expert, AdapterExpert))
        own = _shapes(expert for expert in experts if isinstance(expert, AdapterExpert))
        return find_places(model, of_checkpoint, self.label) | find_places(model, own, self.label)

    def renamed(self, to: Mapping[str, str]) -> "ExpertSet":
        """The same, with other names for tensors; two that get one name have to be changed alike.

        Raises:
            CheckpointError: they are not.
        """
        problems: list[str] = []
        experts = {name: Renamed(name, expert, to, problems) for name, expert in self.experts.items()}
        if problems:
            raise CheckpointError(
                listed(problems, "Merge models whose weights are tied as in this one.", outcome="nothing was changed")
            )
        return ExpertSet(self.label, experts, self.manifest, self.gates and self.gates.renamed(to))

    def find(self, name: str) -> Any:
        """Raises InputError naming the nearest there is."""
        if isinstance(name, str) and name in self.experts:
            return self.experts[name]
        raise InputError(unknown(name, tuple(self.experts)))

    def part(self, expert: str, tensor_name: str, tensor) -> Part:
        """What the expert holds of a tensor, as ops take it, where `tensor` lies; made once, when first asked for."""
        key = expert, tensor_name, tensor.device
        if key not in self._on_devices:
            self._on_devices[key] = moved(self.experts[expert].tensors[tensor_name], tensor).expanded()
        return self._on_devices[key]

    def gate(self, tensor_name: str, tensor) -> Any:
        """The gate of a layer's weight, a torch tensor where `tensor` lies."""
        key = "gate", tensor_name, tensor.device
        if key not in self._on_devices:
            self._on_devices[key] = as_tensor(self.gates.arrays[tensor_name]).to(tensor.device)
        return self._on_devices[key]


def _shapes(experts: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part.shape) for expert in experts for name, part in expert.tensors.items()}


class Renamed:
    """An expert by the model's names of its tensors; `problems` gets what does not go together."""

    def __init__(self, name: str, expert: Any, to: Mapping[str, str], problems: list[str]):
        self._expert, self._names = expert, {}
        for own in expert.tensors:
            other = self._names.setdefault(to.get(own, own), own)
            if other != own and not _alike(expert, own, other):
                problems.append(f"{name}: {other} and {own} are one tensor of the model, but changed differently")
        self.tensors = {new: expert.tensors[own] for new, own in self._names.items()}
        self.metadata = expert.metadata

    def scale(self, name: str) -> float:
        return self._expert.scale(self._names[name])


def _alike(expert: Any, one: str, other: str) -> bool:
    parts, scales = [expert.tensors[name] for name in (one, other)], [expert.scale(name) for name in (one, other)]
    arrays = [part.moved(as_host).arrays for part in parts]
    return (
        scales[0] == scales[1]
        and arrays[0].keys() == arrays[1].keys()
        and all(np.array_equal(array, arrays[1][role]) for role, array in arrays[0].items())
    )
