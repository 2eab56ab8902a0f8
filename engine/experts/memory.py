"""An expert in memory: what merge_state_dicts leaves beside the merged tensors."""

from collections.abc import Mapping
from typing import Any

from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import Array, SparseRows, dtype_of, empty


class MemoryExpert:
    """The same attributes and methods as sidecar.Expert, without a file; filled like a sidecar.SidecarWriter."""

    def __init__(self, name: str):
        self.name = name
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, SparseRows] = {}
        self._starts: dict[str, Array | None] = {}
        self._scales: Mapping[str, float] = {}

    def write(self, name: str, rows: SparseRows, start: Array | None = None) -> None:
        self.tensors[name], self._starts[name] = rows, start

    def finish(self, metadata: Mapping[str, Any], scales: Mapping[str, float]) -> None:
        self.metadata, self._scales = dict(metadata), dict(scales)

    @property
    def mode(self) -> str:
        return self.metadata["mode"]

    def scale(self, name: str) -> float:
        return self._scales[name]

    def start(self, name: str) -> Array | None:
        return self._starts[name]

    def apply(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The merged model with this expert in it: a new state dict that shares the tensors the expert leaves alone.

        Tensors stay on their devices; the expert's rows come there.
        """
        merged = MemoryCheckpoint(state_dict, "merged model")
        applied = dict(state_dict)
        for name, rows in self.tensors.items():
            array, start = merged.read(name), self.start(name)
            out = empty(array.shape, dtype_of(array), like=array)
            rows = SparseRows(*(placed_like(a, array) for a in (rows.offsets, rows.columns, rows.values)), rows.shape)
            start = None if start is None else placed_like(start, array)
            apply_sparse_rows(array, rows, self.scale(name), start=start, out=out)
            applied[name] = merged.like_input(name, out)
        return applied
