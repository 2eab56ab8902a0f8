"""An expert for a backbone that is already there, cut out of a fine-tuned model; no merge."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from freemerge import methods
from freemerge.checkpoint.bare_adapter import BareAdapter
from freemerge.checkpoint.manifest import add_expert, read_manifest
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint, open_result
from freemerge.errors import InputError, OutputError, RecipeError
from freemerge.experts.extract import Extraction
from freemerge.experts.sidecar import SidecarWriter
from freemerge.kernels.array import Array
from freemerge.parts import Layout
from freemerge.plan import make_plan
from freemerge.recipe import Recipe


class _Backbone:
    """A finished result in the place of a sink."""

    def __init__(self, checkpoint: Checkpoint, checksums: dict[str, str]):
        self.records = {name: {"checksum": checksum} for name, checksum in checksums.items()}
        self.read = checkpoint.read


class _OneFile:
    """In the place of the folder of a merge's experts."""

    def __init__(self, path: Path, fsync: bool):
        self._path, self._fsync = path, fsync

    def open(self, _: str, layouts: Mapping[str, Layout]) -> SidecarWriter:
        return SidecarWriter(self._path, layouts, fsync=self._fsync)


def extract_expert(
    merged: str | os.PathLike,
    model: str | os.PathLike,
    *,
    name: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    fsync: bool = True,
    **parameters: Any,
) -> Path:
    """Cut the sparse expert of `model` relative to the backbone `merged` and put it beside it, as free would have.

    Args:
        merged: a directory written by freemerge, by any method.
        model: a fine-tuned checkpoint with the backbone's tensors.
        name: of the expert; the last part of `model` if not given.
        overwrite: replace an expert of this name.
        parameters: of free, as far as they are about experts: density, removal, selection, rescale, expert_scaling,
            include, exclude.

    Returns:
        The expert's file, merged/experts/<name>.safetensors.

    Raises:
        InputError: the two do not fit together, or `merged` is not of freemerge's making.
        OutputError: there is an expert of this name already.
    """
    folder = Path(merged)
    if parameters.get("relative_to", "merged") != "merged":
        raise RecipeError("an expert is extracted relative to the merged backbone; leave relative_to out")
    manifest = read_manifest(folder)
    checksums = {tensor: facts["checksum"] for tensor, facts in manifest["tensors"].items()}
    experts = [model] if name is None else {name: model}
    recipe = Recipe.from_flags("free", merged, experts, parameters)
    path = folder / "experts" / f"{recipe.experts[0].name}.safetensors"
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists; pass overwrite=True (--overwrite) to replace it, or give the expert another name"
        )
    with ExitStack() as stack:
        backbone = stack.enter_context(open_result(folder))
        if isinstance(backbone, BareAdapter):
            raise InputError(f"{merged} is a LoRA adapter; experts are extracted beside merged models")
        fine_tuned = stack.enter_context(open_checkpoint(model, allow_pickle=allow_pickle))
        plan = make_plan(recipe, methods.get("free"), backbone, [fine_tuned], shard_size=1 << 62)
        unfinished = path.with_suffix(".unfinished")
        extraction = Extraction(plan, _Backbone(backbone, checksums), _OneFile(unfinished, fsync))
        for task in plan.tasks:
            if task.settings is not None and not task.match.same_as:
                tensor: Array = backbone.read(task.name)
                extraction.write(task, extraction.cut(task, tensor, tensor, plan.read_experts(task)))
        extraction.finish()
        fine_tuned.check_unchanged()
        unfinished.replace(path)
        add_expert(folder, recipe.experts[0].name, fsync=fsync)
    return path
