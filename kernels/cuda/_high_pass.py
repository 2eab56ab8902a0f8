"""What high_pass and high_pass_magnitudes share on a GPU: the launches of each form of the filter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add, mul

import numpy as np
import torch

from freemerge.kernels._high_pass_gpu_plan import SHARED_MEMORY, HighPassGpuPlan, fits, plan_high_pass_gpu
from freemerge.kernels._high_pass_plan import InnerRing, RadiusFrom, column_bounds, column_kinds
from freemerge.kernels.array import task_vector
from freemerge.kernels.cuda import _compile
from freemerge.kernels.cuda._elements import ELEMENTS, exact
from freemerge.kernels.cuda._transform import Transform, transform
from freemerge.kernels.triton._low_pass import analyse, synthesise

Mask = tuple[float, RadiusFrom, InnerRing]

CUFFT_BYTES = 256 << 20  # of columns handed to cuFFT at once: it takes as much again, and more for awkward lengths


# ---- what is filtered ----


@dataclass(frozen=True)
class Sum:
    """sum_t weights[t] * (experts[t] - base), all experts of one dtype."""

    base: torch.Tensor | None
    experts: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, base, experts: Sequence[torch.Tensor], weights: Sequence[float]) -> "Sum":
        return cls(exact(base), of_one_dtype(experts), tuple(map(float, weights)))

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.experts[0].shape)

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def defines(self) -> dict[str, str]:
        expert = ELEMENTS[self.experts[0].dtype]
        return {"EXPERT": expert, "BASE": ELEMENTS[self.base.dtype] if self.base is not None else expert}

    def arguments(self) -> tuple:
        """The first arguments of a kernel that forms the sum."""
        count = len(self.experts)
        table = torch.empty(2 * count, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        table[:count] = torch.tensor([expert.data_ptr() for expert in self.experts], dtype=torch.int64)
        table[count:].view(torch.float32)[:count] = torch.tensor(self.weights, dtype=torch.float32)
        table = table.to(self.device, non_blocking=True)
        return self.base, table, table[count:], np.int32(count)

    def in_torch(self) -> torch.Tensor:
        task_vectors = (task_vector(self.base, expert) for expert in self.experts)
        return reduce(add, map(mul, self.weights, task_vectors))


def of_one_dtype(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same numbers, in the narrowest dtype that holds them all."""
    tensors = [exact(tensor) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32 if len(dtypes) > 1 else tensors[0].dtype
    return tuple(tensor.to(wide) for tensor in tensors)


def plan_for(values: Sum, mask: Mask) -> HighPassGpuPlan:
    cutoff, radius_from, inner_ring = mask
    return plan_high_pass_gpu(
        values.shape,
        cutoff=cutoff,
        radius_from=radius_from,
        inner_ring=inner_ring,
        shared_memory_bytes=shared_memory(values.device),
        float64=torch.float64 in (values.experts[0].dtype, None if values.base is None else values.base.dtype),
    )


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may have."""
    if device.type != "cuda":
        return SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# ---- tables on the device, made once ----


@dataclass(frozen=True)
class Columns:
    """The columns of the lines' spectrum that are stored between the sweeps.

    Attributes:
        kept: [kept] int32, where each lies in shared memory, in that order.
        mixed: [mixed, 2] int32, the same of column v <= length // 2 and of -v.
        bounds: [mixed, 6] int32: inner, below and outer bound of column v, then of -v.
    """

    kept: torch.Tensor
    mixed: torch.Tensor
    bounds: torch.Tensor


@lru_cache(maxsize=128)
def columns_of(shape: tuple[int, int], axis: int, mask: Mask, device: torch.device) -> Columns:
    bounds, length = column_bounds(shape, axis, *mask), shape[axis]
    keep, drop = column_kinds(bounds, shape[1 - axis])
    mixed = np.flatnonzero((~keep & ~drop)[: length // 2 + 1])
    places = transform(length, shared_memory(device)).places
    kept = np.sort(places(np.flatnonzero(keep)))
    pairs = np.stack([places(mixed), places(-mixed % length)], axis=1)
    on_device = (torch.from_numpy(array).to(device) for array in (kept, pairs))
    return Columns(*on_device, bounds_of(bounds, mixed, device))


@lru_cache(maxsize=64)
def table_of(n: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(transform(n, shared_memory(device)).table()).to(device)


# ---- the form "sweeps" ----


class Sweeps:
    """Two sweeps over the lines of one matrix."""

    def __init__(self, plan: HighPassGpuPlan, values: Sum, mask: Mask):
        self.plan, self.values, self.device = plan, values, values.device
        self.length, self.lines = values.shape[plan.axis], values.shape[1 - plan.axis]
        self.transform: Transform = transform(self.length, shared_memory(self.device))
        self.columns = columns_of(values.shape, plan.axis, mask, self.device)
        pairs = -(-self.lines // 2)
        kept, mixed = len(self.columns.kept), len(self.columns.mixed)
        self.kept = torch.empty((pairs, kept, 2), dtype=torch.float32, device=self.device)
        self.mixed = torch.empty((mixed, self.lines, 2), dtype=torch.float32, device=self.device)

    def write(self, base: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = round(base + F(sum)); base None: without it."""
        if self.plan.axis == 1:
            self.sweep_in(self.values)
            self.sweep_out(base, out)
        else:
            sums = self.transposed()
            self.sweep_in(Sum(None, (sums,), (1.0,)))
            self.sweep_out(None, sums)
            self.transpose_out(sums, base, out)

    def magnitude(self) -> torch.Tensor:
        """The sum of magnitudes of F(sum), float64, without dimensions."""
        self.sweep_in(self.values if self.plan.axis == 1 else Sum(None, (self.transposed(),), (1.0,)))
        partials = torch.empty(len(self.kept), dtype=torch.float64, device=self.device)
        scale = np.float64(1 / self.length)
        self.launch("high_pass_sweep_magnitudes", {}, (*self.stored(), scale, partials))
        return partials.sum()

    def sweep_in(self, values: Sum) -> None:
        arguments = (*values.arguments(), np.int64(self.lines), *self.places(), self.kept, self.mixed)
        self.launch("high_pass_sweep_in", values.defines(), arguments)
        # half, because the lines of a pair are told apart without the halves of their sums
        across(self.mixed, self.columns.bounds, 0.0, 0.5 / self.lines)

    def sweep_out(self, base: torch.Tensor | None, out: torch.Tensor) -> None:
        defines = {"OUT": ELEMENTS[out.dtype], "BASE": ELEMENTS[(out if base is None else base).dtype]}
        self.launch("high_pass_sweep_out", defines, (*self.stored(), base, np.float32(1 / self.length), out))

    def stored(self) -> tuple:
        return self.kept, self.mixed, np.int64(self.lines), *self.places()

    def places(self) -> tuple:
        kept, mixed = self.columns.kept, self.columns.mixed
        return table_of(self.length, self.device), kept, np.int32(len(kept)), mixed, np.int32(len(mixed))

    def launch(self, name: str, defines: dict[str, str], arguments: tuple) -> None:
        elements = {"BASE": "F32", "EXPERT": "F32", "OUT": "F32"} | defines
        kernel = _compile.load("high_pass_sweeps.cu", name, self.transform.defines | elements)
        kernel.launch((len(self.kept),), self.transform.threads, arguments, self.transform.shared_memory)

    # -- lines that are columns --

    def transposed(self) -> torch.Tensor:
        sums = torch.empty((self.lines, self.length), dtype=torch.float32, device=self.device)
        arguments = (*self.values.arguments(), *self.size(), sums)
        self.launch_tiles("high_pass_transpose_in", self.values.defines(), arguments)
        return sums

    def transpose_out(self, values: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> None:
        defines = {"OUT": ELEMENTS[out.dtype], "BASE": ELEMENTS[(out if base is None else base).dtype]}
        self.launch_tiles("high_pass_transpose_out", defines, (values, base, *self.size(), out))

    def size(self) -> tuple[np.int64, np.int64]:
        return tuple(map(np.int64, self.values.shape))

    def launch_tiles(self, name: str, defines: dict[str, str], arguments: tuple) -> None:
        elements = {"BASE": "F32", "EXPERT": "F32", "OUT": "F32"} | defines
        rows, columns = self.values.shape
        grid = (-(-columns // 32), -(-rows // 32))
        _compile.load("high_pass_transpose.cu", name, elements).launch(grid, 256, arguments, 4 * 32 * 33)


def across(spectrum: torch.Tensor, bounds: torch.Tensor, less: float, factor: float) -> None:
    """Filter columns across the lines, in place: times factor * (gain - less); the inverse is not normalised.

    Args:
        spectrum: [columns, lines, 2] float32.
        bounds: [columns, 6] int32, as in `Columns`.
    """
    columns, lines = spectrum.shape[:2]
    if columns == 0:
        return
    numbers = np.float32(less), np.float32(factor)
    if fits(lines, shared_memory(spectrum.device)):
        there = transform(lines, shared_memory(spectrum.device))
        kernel = _compile.load("high_pass_across.cu", "high_pass_across", there.defines)
        arguments = (spectrum, bounds, table_of(lines, spectrum.device), *numbers)
        kernel.launch((columns,), there.threads, arguments, there.shared_memory)
        return
    gain = _compile.load("high_pass_gain.cu", "high_pass_gain", {})
    step = max(1, min(65535, CUFFT_BYTES // (8 * lines)))
    for first in range(0, columns, step):
        part = spectrum[first : first + step]
        transformed = torch.fft.fft(torch.view_as_complex(part))  # cuFFT; torch keeps its plans
        arguments = (transformed, bounds[first : first + step], np.int32(lines), *numbers)
        gain.launch((-(-lines // 256), len(part)), 256, arguments, 0)
        torch.view_as_complex(part).copy_(torch.fft.ifft(transformed, norm="forward"))


# ---- the form "complement" ----


def filter_by_complement(values: Sum, mask: Mask, add_base: bool, out: torch.Tensor) -> None:
    """out = round(base + F(sum)), the latter as the sum less what the mask removes."""
    rows, columns = values.shape
    chosen, bounds = removed_columns(values.shape, mask, values.device)
    spectrum = torch.empty((len(chosen), rows, 2), dtype=torch.float32, device=values.device)
    analyse(values.base, values.experts, values.weights, chosen, spectrum)
    across(spectrum, bounds, 1.0, 1 / (rows * columns))
    synthesise(values.base, values.experts, values.weights, chosen, spectrum, add_base, out)


@lru_cache(maxsize=128)
def removed_columns(shape: tuple[int, int], mask: Mask, device: torch.device) -> tuple[np.ndarray, torch.Tensor]:
    """Columns v <= W // 2 with a gain other than 1, and [columns, 6] int32, their bounds as in `Columns`."""
    bounds, length = column_bounds(shape, 1, *mask), shape[1]
    keep, _ = column_kinds(bounds, shape[0])
    chosen = np.flatnonzero(~keep[: length // 2 + 1])
    return chosen, bounds_of(bounds, chosen, device)


def bounds_of(bounds: np.ndarray, columns: np.ndarray, device: torch.device) -> torch.Tensor:
    both = np.concatenate([bounds[:, columns], bounds[:, -columns % bounds.shape[1]]])
    return torch.from_numpy(np.ascontiguousarray(both.T)).to(device)


# ---- the form "whole" ----


def filter_whole(values: Sum, mask: Mask) -> torch.Tensor:
    """F(sum), float32, by cuFFT on the whole matrix."""
    rows, columns = values.shape
    spectrum = torch.fft.rfft2(values.in_torch())
    spectrum *= half_gain((rows, columns), mask, values.device)
    return torch.fft.irfft2(spectrum, s=(rows, columns))


def half_gain(shape: tuple[int, int], mask: Mask, device: torch.device) -> torch.Tensor:
    """The gain of each coefficient of the half spectrum, [H, W // 2 + 1] float32, symmetrised."""
    rows, columns = shape
    bounds = torch.from_numpy(column_bounds(shape, 1, *mask).copy()).to(device)
    u, v = torch.arange(rows, device=device), torch.arange(columns // 2 + 1, device=device)

    def gain(u, v):
        distance = (u - rows // 2).abs()[:, None]
        inner, below, outer = bounds[:, v][:, None]
        return (distance <= inner).float() + ((distance > below) & (distance <= outer)).float()

    return (gain(u, v) + gain(-u % rows, -v % columns)) / 2
