import numpy as np
import pytest

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


def moved_from(array, seed):
    move = np.random.default_rng(seed).standard_normal(array.shape) * 0.004
    return (array.astype(np.float32) + move).astype(array.dtype)
