"""What follows from the model's weights and its experts together, worked out once for as long as the weights stay."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from freemerge.attached.active import Work
from freemerge.attached.products import additive, changed
from freemerge.parts import Part, Rows


class Derived:
    """Of the experts attached to a model.

    What is kept is small (vectors, and for experts that replace entries what they then add), and is worked out again
    when the tensor it follows from was written to, moved, or replaced.
    """

    def __init__(self, attachment: Any):
        self._attachment = attachment
        self._kept: dict[tuple, tuple[tuple, Any]] = {}

    def parts(self, name: str, work: Work) -> list[tuple[int, Part, float]]:
        """(expert, part, scale) of a tensor, of those experts that the assignment uses."""
        tensor = self._attachment.places[name].tensor
        found = self._while_it_stays(("parts", name), tensor, lambda: self._parts_of_all(name))
        return [part for part in found if work.used[part[0]]]

    def _parts_of_all(self, name: str) -> list[tuple[int, Part, float]]:
        found = self._attachment.found.experts
        return [(e, *self.part(expert, name)) for e, expert in enumerate(found) if name in found[expert].tensors]

    def part(self, expert: str, name: str) -> tuple[Part, float]:
        """What an expert adds to a tensor, and its scale: one that replaces entries, as what it then adds."""
        tensor = self._attachment.places[name].tensor
        part, scale = self._attachment.part(expert, name), self._attachment.found.experts[expert].scale(name)
        if not isinstance(part, Rows) or part.start is None:
            return part, scale
        return self._while_it_stays(("part", expert, name), tensor, lambda: additive(part, scale, tensor))

    def added(self, name: str, experts: Sequence[str]) -> Any:
        """What each of `experts` adds to a vector, float32 [E, n], where it lies; zeros of one without a part."""
        tensor, key = self._attachment.places[name].tensor.detach(), ("added", name, tuple(experts))
        return self._while_it_stays(key, tensor, lambda: self._stacked(name, tensor, experts))

    def _stacked(self, name: str, vector: Any, experts: Sequence[str]) -> Any:
        found, zero = self._attachment.found.experts, torch.zeros(vector.shape, device=vector.device)
        parts = [[self.part(expert, name)] if name in found[expert].tensors else [] for expert in experts]
        return torch.stack([changed(zero, own) if own else zero for own in parts])

    def mixed(self, name: str, work: Work) -> Any:
        """The tensor with each of the mixtures of experts there are; one alone as it is in place, to the bit.

        [U, n] of a vector, else a list of U tensors.
        """
        tensor = self._attachment.places[name].tensor.detach()
        if tensor.ndim == 1 and work.chosen is not None:
            alone = self._while_it_stays(("alone", name), tensor, lambda: self._each_alone(name, tensor))
            return alone[work.placed("chosen", tensor)]
        found = [self._with(name, tensor, mixture) for mixture in work.mixtures]
        return torch.stack(found) if tensor.ndim == 1 else found

    def _each_alone(self, name: str, vector: Any) -> Any:
        """[E + 1, n]: the vector with each expert, and without."""
        experts = self._attachment.found.experts
        return torch.stack([*(self._with(name, vector, row) for row in np.eye(len(experts))), vector])

    def _with(self, name: str, tensor: Any, mixture: np.ndarray) -> Any:
        experts = self._attachment.found.experts
        used = [(e, m) for e, m in zip(experts, mixture, strict=True) if m and name in experts[e].tensors]
        if not used:
            return tensor
        if len(used) == 1 and used[0][1] == 1:
            expert = used[0][0]
            return changed(tensor, [(self._attachment.part(expert, name), experts[expert].scale(name))])
        parts = [(self.part(expert, name), float(weight)) for expert, weight in used]
        return changed(tensor, [(part, scale * weight) for (part, scale), weight in parts])

    def _while_it_stays(self, key: tuple, tensor: Any, work_out: Callable[[], Any]) -> Any:
        state = tensor.device, tensor.dtype, tensor.data_ptr(), self._attachment.versions.of(tensor)
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            kept = self._kept[key] = state, work_out()
        return kept[1]
