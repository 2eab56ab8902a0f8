"""The gates of attached experts: matrices of directions beside linear layers, by which an input picks its experts.

Source: SMILE, arXiv:2408.10174; METHODS.md section 8.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from freemerge.errors import CheckpointError, InputError, listed
from freemerge.kernels.array import Array

REMEDY = "Gates are what `smile` writes beside its experts; attach all experts of its merge together."


class Gates:
    """For `model.routed`: every linear layer weighs the experts by its own input, token by token.

        with model.routed(Gates()):               # top_k as at the merge
            model.generate(**prompts)
        with model.routed(Gates(top_k=2)):

    Args:
        top_k: how many experts answer a token in a layer; what the merge was told unless given.

    Raises:
        InputError: top_k is no whole number from 1 on.
    """

    def __init__(self, top_k: int | None = None):
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise InputError(f"top_k {top_k!r}: a whole number from 1 on, or None for that of the merge")
        self.top_k = top_k


@dataclass(frozen=True)
class GateSet:
    """What a merge has written.

    Args:
        experts: names, in the order of their directions.
        arrays: float32 [T * r, W] by name of the layer's weight [H, W]: r directions of each expert.
        top_k: as told at the merge.
    """

    experts: tuple[str, ...]
    arrays: Mapping[str, Array]
    top_k: int

    def renamed(self, to: Mapping[str, str]) -> "GateSet":
        """The same, with other names for tensors."""
        return replace(self, arrays={to.get(name, name): array for name, array in self.arrays.items()})

    def top_k_for(self, gates: Gates, attached: Collection[str]) -> int:
        """What `gates` means. Raises InputError where experts are not attached, or there are not as many."""
        if missing := [name for name in self.experts if name not in attached]:
            raise InputError(
                f"the gates are of {', '.join(self.experts)}; not attached: {', '.join(missing)}. {REMEDY}"
            )
        top_k = self.top_k if gates.top_k is None else gates.top_k
        if top_k > len(self.experts):
            raise InputError(f"top_k {top_k}: there are {len(self.experts)} experts")
        return top_k


def find_gates(experts: Mapping[str, Any]) -> GateSet | None:
    """The gates that experts (sidecar.Expert or memory.MemoryExpert) share; None where they share none.

    Raises:
        CheckpointError: the notes on whose they are cannot be read.
    """
    for expert in experts.values():
        shared = getattr(expert, "shared", None)
        arrays = {name: roles["gate"] for name, roles in shared.tensors.items() if "gate" in roles} if shared else {}
        if arrays:
            try:
                order, top_k = json.loads(shared.metadata["experts"]), int(expert.metadata["top_k"])
                return GateSet(tuple(map(str, order)), arrays, top_k)
            except (KeyError, ValueError, TypeError):
                problem = f"{expert.name}: metadata do not say of which experts the gates are, and their top_k"
                raise CheckpointError(listed([problem], "Merge again.", outcome="nothing was changed")) from None
    return None
