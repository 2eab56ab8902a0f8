"""Experts in memory: what merge_state_dicts leaves beside the merged tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, dtype_of, empty
from freemerge.parts import Layout, Part, apply_parts


class MemoryExpert:
    """The same attributes and methods as sidecar.Expert, without a file; filled like a sidecar.SidecarWriter."""

    def __init__(self, name: str, shared: "MemoryShared | None" = None):
        self.name, self.shared = name, shared
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Part] = {}
        self._scales: Mapping[str, float] = {}

    def write(self, name: str, part: Part) -> None:
        self.tensors[name] = part

    def finish(self, metadata: Mapping[str, Any], scales: Mapping[str, float]) -> None:
        self.metadata, self._scales = dict(metadata), dict(scales)

    @property
    def mode(self) -> str:
        return self.metadata["mode"]

    def scale(self, name: str) -> float:
        return self._scales[name]

    def apply(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The merged model with this expert in it: a new state dict that shares the tensors the expert leaves alone.

        Tensors stay on their devices; the expert's parts come there.
        """
        return apply_experts(state_dict, [(self, 1.0)])


class MemoryShared(dict):
    """What experts in memory share: tensor -> role -> array; like a sidecar.Shared, filled like a SharedWriter."""

    def __init__(self):
        super().__init__()
        self.metadata: dict[str, str] = {}

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Array]]:
        return self

    def write(self, name: str, arrays: Mapping[str, Array]) -> None:
        self[name] = dict(arrays)

    def finish(self, metadata: Mapping[str, str]) -> None:
        self.metadata = dict(metadata)


class ExpertsInMemory:
    """In the place of a sidecar.ExpertFolder: `experts` by name, and what they share."""

    def __init__(self):
        self.experts: dict[str, MemoryExpert] = {}
        self.shared = MemoryShared()

    def open(self, name: str, layouts: Mapping[str, Layout]) -> MemoryExpert:
        return self.experts.setdefault(name, MemoryExpert(name, self.shared))

    def open_shared(self, method: str, arrays: Mapping[str, Any]) -> MemoryShared:
        return self.shared


def apply_experts(state_dict: Mapping[str, Any], weighted: Sequence[tuple[MemoryExpert, float]]) -> dict[str, Any]:
    """state_dict + sum of weight * scale * part over the experts, with one rounding; a new state dict.

    Raises:
        RecipeError: several experts, of which one replaces entries.
    """
    check_addable([expert for expert, _ in weighted])
    merged = MemoryCheckpoint(state_dict, "merged model")
    applied = dict(state_dict)
    for name in sorted({name for expert, _ in weighted for name in expert.tensors}):
        array = merged.read(name)
        out = empty(tuple(array.shape), dtype_of(array), like=array)
        parts = [
            (expert.tensors[name].moved(lambda a, like=array: placed_like(a, like)), weight * expert.scale(name))
            for expert, weight in weighted
            if name in expert.tensors
        ]
        apply_parts(array, parts, out=out)
        applied[name] = merged.like_input(name, out)
    return applied


def check_addable(experts: Sequence[Any]) -> None:
    """Raise RecipeError where several experts are to be added up of which one replaces entries of the backbone."""
    replacing = [expert.name for expert in experts if expert.mode == "replace"]
    if replacing and len(experts) > 1:
        raise RecipeError(
            f"{', '.join(replacing)} replace entries of the backbone and cannot be added to others; "
            "apply one expert alone, or merge with combine: add"
        )
