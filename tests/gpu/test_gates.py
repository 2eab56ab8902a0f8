"""Gates of a model on a GPU. Without one: with tensors where a GPU has them, on the CPU."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import freemerge
from freemerge.attached import active, in_place
from freemerge.experts.memory import MemoryExpert, MemoryShared
from freemerge.parts import Difference, LowRank
from freemerge.routers import Gates
from freemerge.testing import random_array

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {"0.weight": (16, 12), "2.weight": (5, 16)}


def experts_with_gates():
    shared, found = MemoryShared(), []
    for t, name in enumerate("bac"):
        expert = MemoryExpert(name, shared)
        for i, (layer, (height, width)) in enumerate(LAYERS.items()):
            left, right = (random_array(s, np.float32, 9 * t + i, 0.5) for s in ((height, 2), (2, width)))
            expert.write(layer, LowRank(left, right, (height, width)))
            expert.write(layer.replace("weight", "bias"), Difference(random_array((height,), np.float32, t), (height,)))
        expert.finish({"mode": "add", "backbone": "in memory", "top_k": 1}, dict.fromkeys(expert.tensors, 0.5))
        found.append(expert)
    for layer, (_, width) in LAYERS.items():
        shared.write(layer, {"gate": random_array((6, width), np.float32, 50)})
    shared.finish({"experts": json.dumps([expert.name for expert in found])})
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_pick_as_on_the_cpu(monkeypatch, top_k, dtype):
    torch.manual_seed(0)
    model, experts = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype), experts_with_gates()
    x = torch.randn(4, 6, 12).to(dtype)
    freemerge.attach(model, experts)
    with torch.no_grad(), model.routed(Gates(top_k=top_k)):
        expected = model(x)
    model.detach_experts()
    freemerge.attach(model.to(DEVICE), experts)
    for module in (in_place, active):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
    with torch.no_grad(), model.routed(Gates(top_k=top_k)):
        found = model(x.to(DEVICE)).cpu()
    # the same sums in another order, and one rounding of bfloat16 that may fall the other way
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
