"""What the official FREE-Merging code does to one tensor, in torch, and its time for an element.

    task vector -> fft2 -> two distance masks -> low and high band -> ifft2 of low, of high, of their sum

Written from the description of Zhengsh123/FREE-Merging in docs/methods.md, with its cost: the whole complex spectrum,
masks made anew for every tensor, all three inverse transforms (it keeps the third), and a full sort of every row for
the experts. Files are not touched: for the official code they come on top, in the time of freemerge they are contained.
"""

import statistics
import time
from collections.abc import Sequence

import torch

DENSITY = 0.01


def filtered_task_vector(base: torch.Tensor, expert: torch.Tensor, ratio: float = 0.7) -> torch.Tensor:
    """[H, W] float32: the filtered task vector; the radii are a tenth and `ratio` of the shorter side."""
    spectrum = torch.fft.fft2((expert - base).float())
    inner, outer = masks(spectrum.shape, ratio)
    low, high = spectrum * inner, spectrum * outer
    _, _, both = (torch.fft.ifft2(band).real for band in (low, high, low + high))
    return both


def masks(shape: Sequence[int], ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = shape
    u, v = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.sqrt(((u - height // 2) ** 2 + (v - width // 2) ** 2).float())
    inner, outer = min(shape) // 10, ratio * min(shape)
    return (distance <= inner).float(), ((distance >= inner) & (distance <= outer)).float()


def fr(base: torch.Tensor, experts: Sequence[torch.Tensor], *, align: bool) -> torch.Tensor:
    filtered = [filtered_task_vector(base, expert) for expert in experts]
    if align:
        means = [vector.abs().mean() for vector in filtered]
        filtered = [vector / (mean / max(means)) for vector, mean in zip(filtered, means, strict=True)]
    return (base + 0.3 * sum(filtered)).to(base.dtype)


def free(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return fr(base, experts, align=False), [largest_of_each_row(expert - base) for expert in experts]


def largest_of_each_row(vector: torch.Tensor) -> torch.Tensor:
    """`vector` with all but the int(W * DENSITY) largest entries of each row set to zero, by a full sort."""
    order = vector.abs().sort(dim=-1, descending=True).indices
    keep = torch.zeros_like(vector)
    keep.scatter_(-1, order[..., : int(vector.shape[-1] * DENSITY)], 1)
    return vector * keep


CHAINS = {
    "fr": lambda base, experts: fr(base, experts, align=False),
    "fr_align": lambda base, experts: fr(base, experts, align=True),
    "free": free,
}


def seconds_per_element(shape: tuple[int, int], experts: int, repeats: int) -> dict[str, float]:
    """Chain to its median time on one bfloat16 tensor of `shape` with `experts` experts, by the tensor's elements."""
    torch.manual_seed(0)
    base = (0.02 * torch.randn(shape)).bfloat16()
    tuned = [(base + 3e-4 * torch.randn(shape)).bfloat16() for _ in range(experts)]
    found = {}
    for name, chain in CHAINS.items():
        chain(base, tuned)  # plans of the transforms, memory of the allocator
        found[name] = statistics.median(time_once(chain, base, tuned) for _ in range(repeats)) / base.numel()
    return found


def time_once(chain, base, experts) -> float:
    started = time.perf_counter()
    chain(base, experts)
    return time.perf_counter() - started
