"""Decoding on a GPU with experts in a running model: one step of a 1.1 B Llama, routed and as the backbone alone."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

import freemerge
from attached_models import random_expert
from gpu_merges import shrunk
from gpu_results import Figure
from gpu_timing import Device
from synthetic import FULL, Llama

EXPERTS, DENSITY = 8, 0.01
BATCHES = ((1, 1, 1.05), (32, EXPERTS, 1.15))  # rows, different experts among them, bar


class Layer(nn.Module):
    """Of a Llama, for one token of each row, without a cache of others'."""

    def __init__(self, llama: Llama):
        super().__init__()
        self.width = llama.hidden // llama.heads
        kv = self.width * llama.kv_heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(llama.hidden), nn.RMSNorm(llama.hidden)
        self.q_proj, self.o_proj = (nn.Linear(llama.hidden, llama.hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(llama.hidden, kv, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(llama.hidden, llama.intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(llama.intermediate, llama.hidden, bias=False)

    def forward(self, x):
        normed = self.input_layernorm(x)
        projections = self.q_proj, self.k_proj, self.v_proj
        heads = (projection(normed).unflatten(-1, (-1, self.width)).transpose(1, 2) for projection in projections)
        attended = functional.scaled_dot_product_attention(*heads, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Decoder(nn.Module):
    def __init__(self, llama: Llama):
        super().__init__()
        self.layers = nn.ModuleList(Layer(llama) for _ in range(llama.layers))

    def forward(self, input_embeddings):
        x = input_embeddings
        for layer in self.layers:
            x = layer(x)
        return x


def measure_experts(device: Device, *, shrink: int = 1) -> list[Iterator[Figure]]:
    """Every bar of experts in a running model, measured as they are iterated over; `shrink` divides the widths."""
    return [_decoding(device, shrunk(FULL, shrink)), _switching(device, shrunk(FULL, shrink))]


def _decoding(device: Device, llama: Llama) -> Iterator[Figure]:
    model = _model(device, llama)
    with torch.inference_mode():
        for rows, experts, bar in BATCHES:
            x = torch.randn(rows, 1, llama.hidden, device=device.name, dtype=torch.bfloat16)
            dense = device.seconds(_graphed(device, lambda x=x: model(x)), [()])
            with model.routed([model.experts[row % experts] for row in range(rows)]):
                routed = device.seconds(_graphed(device, lambda x=x: model(x)), [()])
                eager = device.seconds(lambda x=x: model(x), [()])
            what = f"decoding, batch {rows}, {experts} experts"
            yield Figure(f"{what}, CUDA graph", routed, routed / dense, "times the backbone alone", bar, most=True)
            alone = device.seconds(lambda x=x: model(x), [()])
            yield Figure(f"{what}, launched by Python", eager, eager / alone, "times the backbone alone", None)


def _switching(device: Device, llama: Llama) -> Iterator[Figure]:
    model = _model(device, llama)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    load = device.seconds(lambda: model.load_state_dict(state), [()])
    first, second = model.experts[:2]
    switch = device.seconds(model.use_expert, [(first,), (second,)])
    yield Figure("use_expert, one for another", switch, switch / load, "of loading from host memory", 0.03, most=True)


def _model(device: Device, llama: Llama) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device.name):
        model = Decoder(llama).bfloat16().eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return freemerge.attach(model, [random_expert(f"e{e}", shapes, DENSITY, e) for e in range(EXPERTS)])


def _graphed(device: Device, run: Callable[[], object]) -> Callable[[], object]:
    """`run` recorded once and replayed: what the GPU takes without Python, as engines for serving have it."""
    for _ in range(2):
        run()
    if not device.real:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
