"""mergekit's family of methods, and the papers' TIES and PCB, with the real kernels, as on the CPU."""

import numpy as np
import pytest
import torch

import freemerge
from freemerge import methods
from freemerge.checkpoint.torch_arrays import from_torch
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, to_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "interpreter"
SHAPES = {"matrix.weight": (5, 104), "kernel.weight": (2, 3, 2, 2), "norm.weight": (50,)}

# method, number of experts, parameters
METHODS = {
    "ties": ("ties", 2, {"density": 0.3}),
    "ties, rescaled": ("ties", 2, {"density": 0.3, "rescale": True, "normalize": False}),
    "breadcrumbs": ("breadcrumbs", 2, {"density": 0.3, "gamma": 0.1}),
    "breadcrumbs, rows": ("breadcrumbs", 2, {"density": 0.3, "gamma": 0.1, "selection": "row"}),
    "breadcrumbs_ties": ("breadcrumbs_ties", 2, {"density": 0.3}),
    "dare": ("dare", 2, {}),
    "dare_linear": ("dare_linear", 2, {"density": [0.5, 0.0]}),
    "dare_ties": ("dare_ties", 2, {"density": 0.5}),
    "della": ("della", 2, {"density": 0.5}),
    "della_linear": ("della_linear", 2, {"density": 0.5}),
    "sce": ("sce", 2, {"select_topk": 0.5}),
    "sce, everything": ("sce", 2, {}),
    "model_stock": ("model_stock", 2, {}),
    "model_stock, rows": ("model_stock", 2, {"filter_wise": True}),
    "slerp": ("slerp", 1, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, {"weight": [0.3, 0.6]}),
    "nuslerp, rows": ("nuslerp", 2, {"nuslerp_flatten": False}),
    "nuslerp, columns": ("nuslerp", 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", 3, {}),
    "karcher": ("karcher", 3, {}),
    "nearswap": ("nearswap", 1, {"t": 1e-3}),
    "ram": ("ram", 3, {}),
    "ramplus_tl": ("ramplus_tl", 3, {"r": 0.5, "alpha": 2.0}),
    "arcee_fusion": ("arcee_fusion", 1, {}),
    "passthrough": ("passthrough", 1, {"scale": 0.5}),
    "ties_merging": ("ties_merging", 3, {}),
    "ties_merging, largest": ("ties_merging", 2, {"combination": "max", "mask_rate": 0.8, "exclude": "norm"}),
    "dare_ties_merging": ("dare_ties_merging", 2, {"density": 0.5}),
    "pcb": ("pcb", 3, {}),
    "emr, unified": ("emr", 3, {"backbone": "unified"}),
    "pcb, normalized": ("pcb", 2, {"agreement": "normalized", "weight": [0.8, 1.2]}),
}
OF_SUMS = {
    *("dare_linear", "dare_ties", "della", "della_linear", "sce", "ties", "model_stock"),
    *("slerp", "nuslerp", "multislerp", "karcher", "arcee_fusion"),
}


def state_dicts(method, count):
    """A base, or None where the method has none, and experts near it, which leave a third of the entries alone."""
    base = {name: random_array(shape, BFLOAT16, seed=i, scale=0.02) for i, (name, shape) in enumerate(SHAPES.items())}
    experts = []
    for t in range(count):
        expert = {}
        for i, (name, array) in enumerate(base.items()):
            move = random_array(array.shape, np.float32, seed=10 * t + i, scale=4e-3)
            expert[name] = (array.astype(np.float32) + np.where(np.abs(move) < 2e-3, 0, move)).astype(BFLOAT16)
        experts.append(expert)
    return base if methods.get(method).uses_base else None, experts


@pytest.mark.parametrize(("method", "count", "parameters"), METHODS.values(), ids=METHODS)
def test_as_on_the_cpu(method, count, parameters):
    base, experts = state_dicts(method, count)
    start, *there = (
        tensors and {name: to_gpu(array) for name, array in tensors.items()} for tensors in (base, *experts)
    )
    merged = freemerge.merge_state_dicts(method, start, there, device=DEVICE, **parameters)
    expected = freemerge.merge_state_dicts(method, base, experts, **parameters)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        got, want = (array.astype(np.float32) for array in (from_torch(tensor.cpu()), expected[name]))
        # a factor made of float64 sums may have another last bit in float32, and an entry then in bfloat16
        np.testing.assert_allclose(got, want, rtol=2**-7 if method in OF_SUMS else 0, atol=0)
