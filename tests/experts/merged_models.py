"""Merged models with experts, small enough for tests, and what a plain checkpoint with an expert in it holds."""

import numpy as np

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.experts.apply import apply_expert
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

EXPERTS = ("math", "code", "law")


def merged_llama(folder, *, dtype=BFLOAT16, tied=False, experts=EXPERTS, **parameters):
    """A tiny Llama merged by `free`, whose experts touch every kind of tensor it has."""
    config = {"tie_word_embeddings": tied}
    for seed, name in enumerate(("base", *experts)):
        tensors = tiny_llama(seed, dtype=dtype, scale=0.1, **config)
        write_checkpoint(folder / name, tensors, config=tiny_llama_config(**config))
    sources = {name: folder / name for name in experts}
    parameters = {"density": 0.1, "fsync": False, **parameters}
    freemerge.merge("free", base=folder / "base", experts=sources, out=folder / "merged", **parameters)
    return folder / "merged"


def applied(merged, name, out):
    """The bytes of every tensor of the checkpoint that apply_expert writes."""
    apply_expert(merged, name, out, fsync=False)
    with open_checkpoint(out) as checkpoint:
        return {tensor: np.array(checkpoint.read(tensor)).tobytes() for tensor in checkpoint.tensors}
