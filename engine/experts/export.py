"""An expert of a merged model as a LoRA adapter on it, for engines that serve adapters and know nothing of experts."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from freemerge.checkpoint.manifest import read_manifest
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.view import CheckpointView
from freemerge.experts.apply import check_fits, find_expert
from freemerge.experts.lora import AdapterCut, ExtractedTensor, write_adapter
from freemerge.experts.sidecar import Expert
from freemerge.kernels.array import Array


def export_adapter(
    merged: str | os.PathLike,
    name: str,
    out: str | os.PathLike,
    *,
    rank: int,
    leave_out: bool = False,
    only_linear: bool = False,
    overwrite: bool = False,
    fsync: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExtractedTensor]:
    """Write the expert `name` of the merged model as a PEFT LoRA adapter `out` on the backbone.

    What the expert adds to a linear layer's matrix becomes B A, the nearest of its rank (truncated SVD), in float32.
    Other tensors it changes are kept whole, see lora.extract_adapter.

    Args:
        rank: r.
        leave_out: leave out tensors that no adapter can hold, instead of refusing.
        only_linear: leave all other tensors out, for engines that take low-rank updates alone (vLLM does).
        overwrite, fsync, progress: as for freemerge.merge.

    Returns:
        What the adapter holds of each tensor, with the error; `lora.total_error` of it is that of the whole expert.

    Raises:
        InputError: no such expert, it changes nothing, or something that no adapter can hold.
        CheckpointError: the expert was made for another backbone, or a file is damaged.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    merged = Path(merged)
    expert = find_expert(merged, name)
    manifest = read_manifest(merged)
    with open_checkpoint(merged) as backbone:
        check_fits(expert, backbone, manifest["backbone"])
        cut = _ExpertCut(backbone, WithExpert(backbone, expert), rank, only_linear=only_linear)
        leave_out = leave_out or only_linear
        return write_adapter(cut, Path(out), leave_out, overwrite=overwrite, fsync=fsync, progress=progress)


class WithExpert(CheckpointView):
    """A backbone with an expert put in as tensors are read: what apply_expert writes, written nowhere."""

    def __init__(self, backbone: Checkpoint, expert: Expert):
        super().__init__(backbone, {name: (backbone, name) for name in backbone.tensors})
        self.label = f"{backbone.label} with {expert.name}"
        self.backbone, self.expert = backbone, expert

    def read(self, name: str) -> Array:
        array = self.backbone.read(name)
        return self._applied(array, name) if name in self.expert.tensors else array

    def read_run(self, name: str, begin: int, end: int) -> Array:
        if name not in self.expert.tensors:
            return self.backbone.read_run(name, begin, end)
        return self.read(name).reshape(-1)[begin:end]

    def nbytes_made(self, name: str) -> int:
        return self.tensors[name].nbytes if name in self.expert.tensors else 0

    def difference(self, name: str) -> Array:
        """What the expert adds to a tensor, float32, before the sum is rounded to the backbone's dtype."""
        if self.expert.mode == "add":
            return self._applied(np.zeros(self.tensors[name].shape, np.float32), name)
        start = self.backbone.read(name).astype(np.float32)
        return self._applied(start, name) - start

    def _applied(self, array: Array, name: str) -> Array:
        out = np.empty_like(array)
        self.expert.tensors[name].apply(array, self.expert.scale(name), out=out)
        return out


class _ExpertCut(AdapterCut):
    tuned: WithExpert

    def has_changed(self, name: str) -> bool:
        return name in self.tuned.expert.tensors and super().has_changed(name)

    def change(self, name: str) -> Array:
        return self.tuned.difference(name)
