"""Experts in a model on a GPU, in place and routed. Without one: the same way in Triton's interpreter."""

import numpy as np
import pytest
import torch
from parts_of_kinds import experts_for
from torch import nn

import freemerge
from freemerge.attached import active, in_place, products
from freemerge.checkpoint.torch_arrays import from_torch

IDS = torch.arange(24).view(4, 6) % 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Net(nn.Module):
    """One of every kind of route."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.mlp = nn.Embedding(20, 12), nn.LayerNorm(12), nn.Linear(12, 16)
        self.across = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids):
        return self.across(self.mlp(self.norm(self.words(ids))))


def move(model, experts, monkeypatch):
    model.detach_experts()
    freemerge.attach(model.to(DEVICE), experts)
    if DEVICE == "cpu":
        for module in (in_place, active, products):
            monkeypatch.setattr(module, "on_host", lambda tensor: False)


def numbers(model):
    return {name: from_torch(tensor.detach().cpu()).tobytes() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("kind", ["rows", "replace", "mask", "low_rank", "difference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_and_out_again(monkeypatch, kind, dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    experts = experts_for(model, kind)
    freemerge.attach(model, experts)
    backbone = numbers(model)
    model.use_expert("b")
    expected = numbers(model)
    model.use_expert(None)
    move(model, experts, monkeypatch)
    for name, before in (("a", backbone), ("b", expected), (None, backbone)):
        model.use_expert(name)
        if name != "a":
            found = numbers(model)
            # products of narrow matrices may be summed in another order
            same = [n for n in found if kind != "low_rank" or name is None]
            assert {n: found[n] for n in same} == {n: before[n] for n in same}


@pytest.mark.parametrize("kind", ["rows", "replace", "mask", "low_rank", "difference"])
def test_routed(monkeypatch, kind):
    torch.manual_seed(0)
    model = Net()
    experts = experts_for(model, kind)
    freemerge.attach(model, experts)
    weights = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0.5, 0, 0.25]], np.float32)
    with torch.no_grad():
        with model.routed(weights):
            expected = model(IDS)
        move(model, experts, monkeypatch)
        with model.routed(weights):
            torch.testing.assert_close(model(IDS.to(DEVICE)).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are recorded on a GPU")
def test_linear_layers_and_norms_can_be_recorded_as_a_cuda_graph():
    """From its second time on, their forward copies nothing from the host and does not wait for the GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 16)).to(DEVICE)
    freemerge.attach(model, experts_for(model, "rows"))
    x = torch.randn(2, 3, 12, device=DEVICE)
    with torch.inference_mode(), model.routed(model.experts[:2]):
        expected = [model(x), model(x)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
    assert torch.equal(found, expected)
