"""The experts a user names: opened, and refused where their files are damaged or do not belong together."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.attached.adapters import AdapterExpert, is_adapter
from freemerge.attached.experts import ExpertSet
from freemerge.attached.gates import find_gates
from freemerge.checkpoint.bare_adapter import WEIGHTS
from freemerge.checkpoint.manifest import MANIFEST, changed_files, read_manifest
from freemerge.errors import CheckpointError, InputError, ShapeError, gathered, listed
from freemerge.experts.sidecar import read_expert
from freemerge.kernels.all_finite import all_finite
from freemerge.kernels.array import is_float, is_tensor
from freemerge.parts import Rows

FOLDER, GIVEN = "experts", "the experts given"


def open_experts(source: Any, model: Any) -> ExpertSet:
    """The experts of a merged model (its folder), of a folder of experts, of one file, of PEFT adapters, or in memory.

    Args:
        source: a path or an expert in memory, a sequence of them, or a mapping by name. A folder of an adapter gives
            its name to the expert where there is no other.
        model: what they are for; adapters become experts of its tensors. None where it is not loaded yet.

    Raises:
        InputError: there are none, or one name stands twice.
        CheckpointError: with all that is wrong with their files: truncated, changed since they were written, of
            another backbone, adapters of another model.
    """
    if isinstance(source, ExpertSet):
        return source
    opened, errors = [], []
    for name, item in _items(source):
        try:
            opened.append(_open(name, item, model))
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(gathered(errors, outcome="nothing was changed"))
    found = _together(opened, str(source) if _is_path(source) else GIVEN)
    return replace(_checked(found), gates=find_gates(found.experts))


def _items(source: Any) -> list[tuple[str | None, Any]]:
    """What is to be opened, with the names given to it."""
    if isinstance(source, Mapping):
        return list(source.items())
    if _is_path(source) or not isinstance(source, Iterable):
        source = [source]
    return [(None, item) for item in source]


def _open(name: str | None, item: Any, model: Any) -> ExpertSet:
    """What one item of a source holds; one expert where it has a name."""
    if not _is_path(item):
        if not hasattr(item, "tensors") or not hasattr(item, "scale"):
            raise InputError(
                f"{name or 'experts'}: a path or an expert in memory is needed, not a {type(item).__name__}"
            )
        return ExpertSet(GIVEN, {name or item.name: item})
    path = Path(item)
    path = path.parent if path.name == WEIGHTS else path
    if is_adapter(path):
        if model is None:
            raise InputError(f"{path} is a LoRA adapter; load its model with it: freemerge.load(MODEL, experts=...)")
        name = name or path.resolve().name
        return ExpertSet(str(item), {name: AdapterExpert(name, path, model)})
    found = _from_files(path)
    if name is None:
        return found
    if len(found.experts) > 1:
        raise InputError(f"{name}: {item} holds {len(found.experts)} experts; give the file of one")
    return replace(found, experts=dict(zip([name], found.experts.values(), strict=True)))


def _is_path(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


def _together(opened: Sequence[ExpertSet], label: str) -> ExpertSet:
    """Several as one, with the manifest of the first that has one."""
    experts, problems = {}, []
    for some in opened:
        problems += [f"{name}: in {some.label} too; give them names" for name in some.experts.keys() & experts.keys()]
        experts |= some.experts
    if problems:
        raise InputError(listed(problems, 'Give a mapping, {"name": expert}.', outcome="nothing was changed"))
    if not experts:
        raise InputError(f"{label}: there are no experts; give a merged model, its folder {FOLDER}, or adapters")
    return ExpertSet(label, experts, next((some.manifest for some in opened if some.manifest), None))


def _from_files(source: Path) -> ExpertSet:
    folder = source.parent if source.is_file() else source / FOLDER if (source / FOLDER).is_dir() else source
    paths = [source] if source.is_file() else sorted(folder.glob("*.safetensors"))
    if folder == source and any((source / name).exists() for name in (MANIFEST, "config.json")):
        raise InputError(f"{source} has no experts: merge with a method that writes them")
    if not paths:
        raise InputError(f"{source} holds no experts; give a merged model, its folder {FOLDER}, or an adapter of PEFT")
    manifest = read_manifest(folder.parent) if (folder.parent / MANIFEST).exists() else None
    problems, experts = _changed_files(paths, folder.parent, manifest), {}
    if not problems:
        for path in paths:
            try:
                expert = read_expert(path)
            except CheckpointError as error:
                problems += getattr(error.args[0], "listed", [str(error)])
                continue
            if expert.name in experts:
                problems.append(f"{path}: is {expert.name!r}, as {experts[expert.name].path} is")
            experts[expert.name] = expert
    if problems:
        raise CheckpointError(listed(problems, "Copy the files again, or merge again.", outcome="nothing was changed"))
    return ExpertSet(str(source), experts, manifest)


def _changed_files(paths: Sequence[Path], merged: Path, manifest: Mapping | None) -> list[str]:
    beside = [path.parent / "shared" / other.name for path in paths[:1] for other in path.parent.glob("shared/*")]
    return changed_files(merged, manifest or {}, [*paths, *beside])


def _checked(found: ExpertSet) -> ExpertSet:
    problems = [*_other_backbones(found), *_other_shapes(found.experts), *_broken_rows(found.experts)]
    if not found.manifest and not problems:  # with one, checksums have told
        problems += _odd_numbers(found.experts)
    if problems:
        raise CheckpointError(
            listed(problems, "Attach the experts of one merge, as it wrote them.", outcome="nothing was changed")
        )
    return found


def _other_backbones(found: ExpertSet) -> list[str]:
    backbones = {n: e.metadata.get("backbone") for n, e in found.experts.items() if not isinstance(e, AdapterExpert)}
    expected = found.manifest["backbone"] if found.manifest else next(iter(backbones.values()), None)
    where = "the model beside it is" if found.manifest else "the others are for"
    return [
        f"{name}: made for the backbone {backbone}, {where} {expected}"
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


def _odd_numbers(experts: Mapping[str, Any]) -> Iterable[str]:
    """What no merge writes: NaN, Inf, columns that stand twice (an expert could not be taken out again)."""
    for name, expert in experts.items():
        for tensor, part in () if isinstance(expert, AdapterExpert) else expert.tensors.items():
            arrays: list[Any] = []
            part.moved(lambda array, seen=arrays: seen.append(array) or array)
            arrays = [array for array in arrays if not is_tensor(array)]
            if not all(all_finite(np.ascontiguousarray(array)) for array in arrays if is_float(array.dtype)):
                yield f"{name}: {tensor} has NaN or Inf"
            if isinstance(part, Rows) and not is_tensor(part.columns) and not _ascending(part):
                yield f"{name}: the columns of a row of {tensor} do not ascend"


def _ascending(rows: Rows) -> bool:
    falls = np.flatnonzero(rows.columns[1:] <= rows.columns[:-1]) + 1
    return bool(np.isin(falls, rows.offsets).all())
