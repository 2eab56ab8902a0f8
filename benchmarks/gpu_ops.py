"""Ops on a GPU against the bytes they move and against what torch and cuFFT offer for the same."""

from collections.abc import Iterator

import torch

from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.high_pass import high_pass
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from gpu_results import Figure
from gpu_timing import Device

WEIGHTS = [0.3, 0.3, 0.3]
CUTOFF = 0.7
DENSITY = 0.01
STREAMED = (16384, 16384)  # 2.7 GB in and out: well past launch overhead
SQUARE = (4096, 4096)
OBLONG = [(4096, 14336), (4096, 11008)]


def weights_like_trained(shape, device: str, seed: int) -> tuple:
    """(base, three experts, output), bfloat16; experts differ from the base by a few units in the last place."""
    random = torch.Generator(device).manual_seed(seed)
    base = torch.randn(shape, generator=random, device=device) * 0.02
    experts = [(base + torch.randn(shape, generator=random, device=device) * 1e-3).bfloat16() for _ in range(3)]
    return base.bfloat16(), experts, torch.empty(shape, dtype=torch.bfloat16, device=device)


def measure_ops(device: Device, copy: float, *, shrink: int = 1) -> list[Iterator[Figure]]:
    """Every bar of the ops, measured as they are iterated over.

    Args:
        copy: the copy bandwidth, bytes/s.
        shrink: divides all sides, to try these lines.
    """

    def inputs(shape):
        return device.rotated(lambda seed: weights_like_trained([side // shrink for side in shape], device.name, seed))

    return [
        _streaming(device, inputs, copy),
        *(_high_pass(device, inputs, shape, copy) for shape in (SQUARE, *OBLONG)),
        _sparse_rows(device, inputs),
    ]


def _streaming(device: Device, inputs, copy: float) -> Iterator[Figure]:
    sets = inputs(STREAMED)
    size = sets[0][0].numel()
    seconds = device.seconds(lambda base, experts, out: add_task_vectors(base, experts, WEIGHTS, out=out), sets)
    yield Figure.of_bytes("add_task_vectors", 10 * size, seconds, copy, bar=0.85)
    seconds = device.seconds(lambda base, experts, out: task_vector_statistics(base, experts), sets)
    yield Figure.of_bytes("task_vector_statistics", 8 * size, seconds, copy, bar=0.85)


def _high_pass(device: Device, inputs, shape: tuple[int, int], copy: float) -> Iterator[Figure]:
    sets, square = inputs(shape), shape == SQUARE
    rows, columns = sets[0][0].shape
    name = f"high_pass {rows}x{columns}"
    mask = _mask(rows, columns, device.name)
    ours = device.seconds(
        lambda base, experts, out: high_pass(base, experts, WEIGHTS, cutoff=CUTOFF, inner_ring="official", out=out),
        sets,
    )
    chain = device.seconds(lambda *arguments: _torch_chain(*arguments, mask), sets)
    moved = (2 * 4 + 1) * 2 * rows * columns  # the inputs twice, the output once
    yield Figure.of_bytes(name, moved, ours, copy, bar=0.6 if square else None)
    yield Figure.against(f"{name}, torch chain", ours, chain, bar=15 if square else 5)
    real = device.seconds(lambda *arguments: _real_chain(*arguments, _half(mask)), sets)
    yield Figure.against(f"{name}, rfft2 chain", ours, real, bar=None if square else 3)


def _mask(rows: int, columns: int, device: str) -> torch.Tensor:
    """The official mask, in the order of the transform."""
    u, v = torch.arange(rows, device=device) - rows // 2, torch.arange(columns, device=device) - columns // 2
    distance = (u[:, None] ** 2 + v**2).float().sqrt()
    ring = min(rows, columns) // 10
    inner, outer = distance <= ring, distance <= CUTOFF * min(rows, columns)
    return inner.float() + ((distance >= ring) & outer).float()


def _half(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, : mask.shape[1] // 2 + 1].contiguous()


def _torch_chain(base, experts, out, mask) -> None:
    """What the authors' code does, without its copies: for each expert fft2, mask, ifft2, real, add."""
    start = base.float()
    total = torch.zeros_like(start)
    for weight, expert in zip(WEIGHTS, experts, strict=True):
        total += weight * torch.fft.ifft2(torch.fft.fft2(expert.float() - start) * mask).real
    out.copy_(start + total)


def _real_chain(base, experts, out, half) -> None:
    """The same by cuFFT as one would write it well: the sum first, real transforms, the mask in place."""
    start = base.float()
    total = torch.zeros_like(start)
    for weight, expert in zip(WEIGHTS, experts, strict=True):
        total.add_(expert.float().sub_(start), alpha=weight)
    spectrum = torch.fft.rfft2(total).mul_(half)
    out.copy_(start.add_(torch.fft.irfft2(spectrum, s=total.shape)))


def _sparse_rows(device: Device, inputs) -> Iterator[Figure]:
    sets = inputs(SQUARE)
    count = int(sets[0][0].numel() * DENSITY)
    ours = device.seconds(lambda base, experts, out: sparse_rows(base, experts[0], last=count), sets)

    def topk(base, experts, out):
        delta = (experts[0].float() - base.float()).view(-1)
        index = delta.abs().topk(count).indices
        return index, delta[index]

    yield Figure.against("sparse_rows 1 %, torch.topk", ours, device.seconds(topk, sets), bar=4)
