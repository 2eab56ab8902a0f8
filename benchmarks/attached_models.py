"""Models with experts of random entries, for benchmarks: made in memory, fast."""

import math

import numpy as np
import torch
from torch import nn

from freemerge.experts.memory import MemoryExpert
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


class Bare(nn.Module):
    """Parameters of these names and nothing else."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
