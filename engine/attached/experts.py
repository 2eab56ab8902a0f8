"""The experts that can be attached to a model: read, checked, and each part brought to where it is needed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.attached.assignment import unknown
from freemerge.attached.gates import GateSet, find_gates
from freemerge.attached.in_place import as_host, moved
from freemerge.checkpoint.manifest import MANIFEST, changed_files, read_manifest
from freemerge.checkpoint.torch_arrays import as_tensor
from freemerge.errors import CheckpointError, InputError, ShapeError, listed
from freemerge.experts.sidecar import read_expert
from freemerge.parts import Part

FOLDER = "experts"


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one backbone, by name.

    Args:
        label: where they are from, for messages.
        experts: each a sidecar.Expert or a memory.MemoryExpert.
        manifest: freemerge.json of the backbone, where there is one.
        gates: what their layers have to pick them by, where they share some.
    """

    label: str
    experts: Mapping[str, Any]
    manifest: Mapping[str, Any] | None = None
    gates: GateSet | None = None
    _on_devices: dict = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that an expert changes."""
        return {n: tuple(part.shape) for expert in self.experts.values() for n, part in expert.tensors.items()}

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
        if name in self.experts:
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


def open_experts(source: Any) -> ExpertSet:
    """The experts of a merged model (its folder), of a folder of experts, of one file, or in memory.

    Args:
        source: a path, or experts in memory: a mapping by name, or a sequence of them.

    Raises:
        InputError: there are none.
        CheckpointError: with all that is wrong with their files: truncated, changed since they were written, of
            another backbone.
    """
    if isinstance(source, ExpertSet):
        return source
    if isinstance(source, Mapping):
        return _checked(ExpertSet("the experts given", dict(source)))
    if isinstance(source, (str, Path)) or hasattr(source, "__fspath__"):
        return _checked(_from_files(Path(source)))
    return _checked(ExpertSet("the experts given", {expert.name: expert for expert in source}))


def _from_files(source: Path) -> ExpertSet:
    folder = source.parent if source.is_file() else source / FOLDER if (source / FOLDER).is_dir() else source
    paths = [source] if source.is_file() else sorted(folder.glob("*.safetensors"))
    if folder == source and any((source / name).exists() for name in (MANIFEST, "config.json")):
        raise InputError(f"{source} has no experts: merge with a method that writes them")
    if not paths:
        raise InputError(f"{source} holds no experts; give a merged model, or its folder {FOLDER}")
    manifest = read_manifest(folder.parent) if (folder.parent / MANIFEST).exists() else None
    problems, experts = _changed_files(paths, folder.parent, manifest), []
    if not problems:
        for path in paths:
            try:
                experts.append(read_expert(path))
            except CheckpointError as error:
                problems += getattr(error.args[0], "listed", [str(error)])
    if problems:
        raise CheckpointError(listed(problems, "Copy the files again, or merge again.", outcome="nothing was changed"))
    return ExpertSet(str(source), {expert.name: expert for expert in experts}, manifest)


def _changed_files(paths: Sequence[Path], merged: Path, manifest: Mapping | None) -> list[str]:
    beside = [path.parent / "shared" / other.name for path in paths[:1] for other in path.parent.glob("shared/*")]
    return changed_files(merged, manifest or {}, [*paths, *beside])


def _checked(found: ExpertSet) -> ExpertSet:
    problems = [*_other_backbones(found), *_other_shapes(found.experts), *_broken_rows(found.experts)]
    if problems:
        raise CheckpointError(
            listed(problems, "Attach the experts of one merge, as it wrote them.", outcome="nothing was changed")
        )
    return replace(found, gates=find_gates(found.experts))


def _other_backbones(found: ExpertSet) -> list[str]:
    backbones = {name: expert.metadata.get("backbone") for name, expert in found.experts.items()}
    expected = found.manifest["backbone"] if found.manifest else next(iter(backbones.values()), None)
    where = "the model beside it" if found.manifest else "the others"
    return [
        f"{name}: made for the backbone {backbone}, {where} is {expected}"
        for name, backbone in backbones.items()
        if backbone != expected
    ]


def _other_shapes(experts: Mapping[str, Any]) -> Iterable[str]:
    shapes: dict[str, tuple] = {}
    for name, expert in experts.items():
        for tensor, part in expert.tensors.items():
            first = shapes.setdefault(tensor, tuple(part.shape))
            if first != tuple(part.shape):
                yield f"{name}: {tensor} is {list(part.shape)}, {list(first)} in another expert"


def _broken_rows(experts: Mapping[str, Any]) -> Iterable[str]:
    """Rows that would lead out of their tensor; a file's header does not show them."""
    for name, expert in experts.items():
        for tensor, part in expert.tensors.items():
            scale = expert.scale(tensor)
            if not np.isfinite(scale):
                yield f"{name}: {tensor} has the scale {scale}"
            try:
                part.check()
            except ShapeError as error:
                yield f"{name}: {tensor}: {error}"
