import importlib

import numpy as np
import pytest

from freemerge.checkpoint.torch_arrays import from_torch, is_torch, to_torch
from freemerge.kernels import dispatch
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint


@pytest.fixture
def models(tmp_path):
    """A tiny Llama and three fine-tuned copies on disk, the second sharded: (base, [experts]) as strings."""
    base = tiny_llama(0, dtype=BFLOAT16)
    folders = [write_checkpoint(tmp_path / "base", base, config=tiny_llama_config(torch_dtype="bfloat16"))]
    for t, name in enumerate(("math", "code", "chat"), 1):
        moved = {key: moved_from(array, seed=1000 * t + i) for i, (key, array) in enumerate(base.items())}
        folders.append(
            write_checkpoint(
                tmp_path / name, moved, shards=3 if t == 2 else 1, config=tiny_llama_config(torch_dtype="bfloat16")
            )
        )
    return str(folders[0]), [str(folder) for folder in folders[1:]]


@pytest.fixture
def gpu_calls(monkeypatch):
    """References stand in for the GPU versions of ops, on CPU tensors; the names of those that were called."""
    seen = []

    def gpu_version(op):
        reference = getattr(importlib.import_module(f"freemerge.kernels.{op}"), f"{op}_reference")

        def run(*args):
            seen.append(op)
            return _as_tensors(reference(*map(_as_arrays, args)))

        return run

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "gpu_version", gpu_version)
    return seen


def _as_arrays(value):
    if isinstance(value, list | tuple):
        return [_as_arrays(item) for item in value]
    return from_torch(value) if is_torch(value) else value


def _as_tensors(value):
    if isinstance(value, tuple):
        return tuple(map(_as_tensors, value))
    return to_torch(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def moved_from(array, seed):
    move = np.random.default_rng(seed).standard_normal(array.shape) * 0.004
    return (array.astype(np.float32) + move).astype(array.dtype)
