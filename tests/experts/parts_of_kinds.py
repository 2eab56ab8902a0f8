"""Experts of random parts, of every kind, for any model."""

import math

import numpy as np

from freemerge.experts.memory import MemoryExpert
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.parts import Difference, LowRank, Mask, Rows
from freemerge.testing import random_array


def part_of_kind(kind, shape, seed, tensor):
    """A change of about a tenth of the size of `tensor`."""
    dense = random_array(shape, np.float32, seed, 0.3)
    if kind in ("rows", "replace"):
        rows = sparse_rows(None, dense, last=max(1, dense.size // 5))
        start = rows.gather(np.asarray(tensor, np.float32)) * np.float32(0.9) if kind == "replace" else None
        return Rows(rows.offsets, rows.columns, rows.values, shape, start)
    if kind == "mask":
        mask = np.packbits(np.random.default_rng(seed).random(dense.size) < 0.4, bitorder="little")
        return Mask(mask, random_array(shape, np.float32, 99, 0.3), shape)
    if kind == "low_rank" and len(shape) > 1:
        left = random_array((math.prod(shape[:-1]), 2), np.float32, seed)
        return LowRank(left, random_array((2, shape[-1]), np.float32, seed, 0.1), shape)
    return Difference(dense, shape)


def experts_for(model, kind, names="abc"):
    """Experts, of which none changes all tensors; a tied tensor under one name."""
    found, tensors = [], {value.data_ptr(): (name, value) for name, value in reversed(model.state_dict().items())}
    for number, name in enumerate(names):
        expert = MemoryExpert(name)
        for i, (tensor, value) in enumerate(tensors.values()):
            if value.is_floating_point() and (number + i) % 5:
                array = value.float().numpy()
                expert.write(tensor, part_of_kind(kind, tuple(value.shape), 100 * number + i, array))
        mode = "replace" if kind == "replace" else "add"
        expert.finish({"mode": mode, "backbone": "in memory"}, dict.fromkeys(expert.tensors, 0.5))
        found.append(expert)
    return found
