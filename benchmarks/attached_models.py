"""Experts of random entries, for benchmarks: made fast."""

import math
from pathlib import Path

import numpy as np

from freemerge.experts.memory import MemoryExpert
from freemerge.experts.sidecar import SidecarWriter
from freemerge.kernels.array import column_dtype, rows_of
from freemerge.parts import Rows


def random_rows(shape: tuple[int, ...], density: float, seed: int) -> Rows:
    """Entries at random places, about `density` of all, as the largest of a tensor lie."""
    rng = np.random.default_rng(seed)
    height, width = rows_of(shape)
    size = height * width
    gaps = rng.integers(1, round(2 / density), int(size * density * 1.1) + 8)
    index = np.cumsum(gaps) - 1
    index = index[: np.searchsorted(index, size)]
    offsets = np.searchsorted(index, np.arange(height + 1) * width).astype(np.int64)
    values = rng.standard_normal(len(index), np.float32) * np.float32(1e-3)
    return Rows(offsets, (index % width).astype(column_dtype(width)), values, tuple(shape))


def random_expert(name: str, shapes: dict[str, tuple[int, ...]], density: float, seed: int) -> MemoryExpert:
    expert = MemoryExpert(name)
    for i, (tensor, shape) in enumerate(shapes.items()):
        if math.prod(shape) * density >= 1:
            expert.write(tensor, random_rows(shape, density, seed * 1000 + i))
    expert.finish({"mode": "add", "backbone": "in memory"}, dict.fromkeys(expert.tensors, 5.0))
    return expert


def write_expert(path: Path, shapes: dict[str, tuple[int, ...]], density: float, seed: int) -> Path:
    """The same in a file."""
    expert = random_expert(path.stem, shapes, density, seed)
    writer = SidecarWriter(path, {name: part.layout for name, part in expert.tensors.items()}, fsync=False)
    for name, part in expert.tensors.items():
        writer.write(name, part)
    writer.finish({**expert.metadata, "expert": path.stem, "method": "random"}, 5.0)
    writer.close()
    return path
