"""The form of the high-pass filter that suits a matrix on a GPU, by its cost; which lengths a block transforms."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from freemerge.kernels._high_pass_plan import (
    InnerRing,
    RadiusFrom,
    check_parameters,
    column_bounds,
    column_kinds,
)

LARGEST_RADIX = 61  # as in csrc/include/freemerge/butterfly.h: butterflies in registers
LARGEST_PRIME = 127  # direct sums by all threads of a block
SHARED_MEMORY = 232_448  # bytes a block may have on sm_90; 166,912 on sm_80

# An H200, in units a nanosecond: bytes of device memory, bytes of shared memory, instructions of a thread.
# Not measured: nine tenths of 4.8 TB/s; 132 multiprocessors at 1.7 GHz, 128 bytes and 128 instructions a clock, at 2/3.
DEVICE_BYTES, SHARED_BYTES, INSTRUCTIONS = 4_300.0, 19_000.0, 19_000.0
TENSOR_FLOPS = 250_000.0  # tf32, half of what they do at best
LAUNCH = 4_000.0  # nanoseconds a kernel costs at least


@dataclass(frozen=True)
class HighPassGpuPlan:
    """How a matrix of one shape is filtered on a GPU.

    Attributes:
        form: "keep" (nothing is removed: no transform), "complement" (subtract the few coefficients removed, by
            products on tensor cores), "sweeps" (transform all lines in shared memory, and across them only the columns
            the mask cuts) or "whole" (a line fits no block: cuFFT on the whole matrix).
        axis: 1 where the lines are rows; 0 where they are columns: the matrix is transposed on the way in and out.
        removed: share of the coefficients with gain 0.
        kept: columns of the lines' spectrum stored as they are; in sweeps.
        mixed: columns of half the lines' spectrum that are filtered across the lines: in sweeps those with more than
            one gain, in the complement all with a gain other than 1.
        across: where that happens: "shared" memory, or "cufft" where the columns are too long or of an awkward length.
        workspace: bytes of device memory.
        nanoseconds: predicted for an H200 and three experts of two bytes.
    """

    form: Literal["keep", "complement", "sweeps", "whole"]
    axis: Literal[0, 1]
    removed: float
    kept: int
    mixed: int
    across: Literal["shared", "cufft"]
    workspace: int
    nanoseconds: float

    def describe(self) -> str:
        """A line for `--dry-run`."""
        by = " by cuFFT" if self.across == "cufft" and self.mixed else ""
        how = {
            "keep": "no transform",
            "complement": f"complement, {self.mixed} columns{by}",
            "sweeps": f"two sweeps over {('columns', 'rows')[self.axis]}, {self.mixed} columns across{by}",
            "whole": "cuFFT on the whole matrix",
        }[self.form]
        return f"removes {self.removed:.3%}; {how}; {self.workspace / 2**20:.1f} MiB; {self.nanoseconds / 1000:.0f} us"


@lru_cache(maxsize=1024)
def plan_high_pass_gpu(
    shape: tuple[int, int],
    *,
    cutoff: float = 0.7,
    radius_from: RadiusFrom = "min",
    inner_ring: InnerRing = "clean",
    shared_memory_bytes: int = SHARED_MEMORY,
    float64: bool = False,
) -> HighPassGpuPlan:
    """Choose the form and the axis of the filter for a matrix H x W: the cheapest by a model of its cost.

    Args:
        shared_memory_bytes: what a block may have on the device.
        float64: whether the base or an expert is; the products of the complement take none.

    Raises:
        RecipeError: `cutoff` is negative or not a number, or a name is unknown.
    """
    mask = (tuple(int(size) for size in shape), float(cutoff), radius_from, inner_ring)
    plans = possible_gpu_plans(*mask, shared_memory_bytes)
    return min(
        (plan for plan in plans if not (float64 and plan.form == "complement")), key=lambda plan: plan.nanoseconds
    )


def possible_gpu_plans(
    shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing, shared_memory_bytes: int
) -> list[HighPassGpuPlan]:
    """Every form that gives the right answer, for the choice and for tests."""
    check_parameters(cutoff, radius_from, inner_ring)
    size = shape[0] * shape[1]
    if size == 0:
        return [HighPassGpuPlan("keep", 1, 0.0, 0, 0, "shared", 0, 0.0)]
    plans = []
    for axis in (1, 0):
        length, lines = shape[axis], shape[1 - axis]
        bounds = column_bounds(shape, axis, cutoff, radius_from, inner_ring)
        keep, drop = column_kinds(bounds, lines)
        removed = _removed(bounds, lines)
        kept, mixed, others = int(keep.sum()), *(int(c[: length // 2 + 1].sum()) for c in (~keep & ~drop, ~keep))
        if kept == length:
            return [HighPassGpuPlan("keep", 1, 0.0, kept, 0, "shared", 0, LAUNCH + 10 * size / DEVICE_BYTES)]
        across = "shared" if fits(lines, shared_memory_bytes) else "cufft"
        if axis == 1:
            plans.append(_whole_plan(size, removed))
            if removed <= 0.25:  # a small difference of large numbers is not accurate
                plans.append(_complement_plan(lines, length, removed, others, across))
        if fits(length, shared_memory_bytes):
            plans.append(_sweeps_plan(axis, length, lines, removed, kept, mixed, across))
    return plans


def _removed(bounds: np.ndarray, lines: int) -> float:
    inner, below, outer = bounds.astype(np.int64)

    def within(bound):
        return np.clip(2 * bound + 1, 0, lines)

    twice = np.maximum(within(np.minimum(inner, outer)) - within(below), 0)
    some = within(inner) + np.maximum(within(outer) - within(below), 0) - twice
    return 1 - float(some.sum()) / (lines * bounds.shape[1])


# ---- lengths ----


@lru_cache(maxsize=256)
def radices(n: int) -> tuple[int, ...] | None:
    """The passes of a transform of n points by one block, or None where a prime factor is too large.

    Small odd factors come first, where a block's points lie far apart, then powers of two, whose strides the order of
    points in shared memory suits; last the primes above 13, with many registers each. The first and the last pass have
    more to hold in registers and are no larger than 16; a pass of radix 1 does nothing.
    """
    small, primes = n, []
    for prime in range(17, LARGEST_PRIME + 1, 2):
        while small % prime == 0 and all(prime % d for d in range(3, 12, 2)):
            small //= prime
            primes.append(prime)
    passes = min((_prime_passes(small), _fewest_passes(small)), key=len)
    if np.prod(passes) != small:
        return None
    order = [*passes, *reversed(primes)]
    if not order or order[0] > 16 or len(order) == 1:
        order.insert(0, 1)
    if order[-1] > 16 or len(order) == 1:
        order.append(1)
    return tuple(order)


def _prime_passes(n: int) -> list[int]:
    """A pass for each odd factor up to 13, then powers of two of about one size."""
    odd, twos = [], 0
    while n % 2 == 0:
        n, twos = n // 2, twos + 1
    for prime in (3, 5, 7, 11, 13):
        while n % prime == 0:
            n //= prime
            odd.append(prime)
    count = -(-twos // 4)
    return odd + [2 ** (twos // count + (k < twos % count)) for k in range(count)]


@lru_cache(maxsize=1024)
def _fewest_passes(n: int) -> list[int]:
    """With 6, 9, 10, 12, 14 and 15 as well; of the shortest ways the one with the smallest butterflies."""
    ways = [[r, *_fewest_passes(n // r)] for r in range(2, 17) if n % r == 0]
    best = min(ways, key=lambda way: (np.prod(way) != n, len(way), sum(way)), default=[])
    return sorted(best, key=lambda r: (r & -r == r, -r))


def point_bytes(n: int) -> int:
    """Shared memory n points take."""
    return -(-n // 16) * 16 * 8


def fits(n: int, shared_memory_bytes: int) -> bool:
    """Whether one block transforms n points in its shared memory."""
    return point_bytes(n) <= shared_memory_bytes and radices(n) is not None


# ---- what it costs ----


def _transform(n: int) -> tuple[float, float]:
    """(bytes of shared memory, instructions) for each complex point of a transform of n points."""
    trips, instructions = 0.0, 0.0
    for radix in radices(n):
        trips += 16 * (1 if radix <= LARGEST_RADIX else radix / 2)
        twiddles = 8 if radix > 1 else 0
        butterfly = 2.5 * np.log2(radix) if radix <= 16 else radix if radix <= LARGEST_RADIX else 3 * radix
        instructions += twiddles + butterfly
    return trips, instructions


def _sweep(points: float, transform: tuple[float, float], device_bytes: float, instructions: float) -> float:
    """Nanoseconds: the slowest of the three, and a quarter of the others, which overlap in part."""
    shared, own = transform
    memory, exchanges = device_bytes / DEVICE_BYTES, points * shared / SHARED_BYTES
    arithmetic = (points * own + instructions) / INSTRUCTIONS
    slowest = max(memory, exchanges, arithmetic)
    return LAUNCH + slowest + 0.25 * (memory + exchanges + arithmetic - slowest)


def _sweeps_plan(
    axis: int, length: int, lines: int, removed: float, kept: int, mixed: int, across: str
) -> HighPassGpuPlan:
    size, points = length * lines, length * -(-lines // 2)
    inputs, outputs, ends = 8.0, 4.0, (20, 8)
    stored = 8.0 * (kept * -(-lines // 2) + mixed * lines)
    nanoseconds = 0.0
    if axis == 0:  # float32 in between, transposed
        nanoseconds += _sweep(0, (0, 0), 12.0 * size, 25 * size) + _sweep(0, (0, 0), 8.0 * size, 12 * size)
        inputs, outputs, ends = 4.0, 4.0, (4, 4)
    shared, own = _transform(length)
    nanoseconds += _sweep(points, (shared, own), inputs * size + stored, ends[0] * size)
    nanoseconds += _sweep(points, (shared + 8, own), outputs * size + stored, ends[1] * size)
    nanoseconds += _across(mixed, lines, across)
    workspace = int(stored) + (4 * size if axis == 0 else 0)
    return HighPassGpuPlan("sweeps", axis, removed, kept, mixed, across, workspace, nanoseconds)


def _across(columns: int, lines: int, across: str) -> float:
    if columns == 0:
        return 0.0
    if across == "cufft":
        return 7 * (LAUNCH + 16.0 * columns * lines / DEVICE_BYTES)
    shared, own = _transform(lines)
    return _sweep(columns * lines, (2 * shared, 2 * own + 12), 16.0 * columns * lines, 0)


def _complement_plan(lines: int, length: int, removed: float, columns: int, across: str) -> HighPassGpuPlan:
    size = length * lines
    products = size * columns * 24 / TENSOR_FLOPS  # there and back, real and imaginary, each in three parts
    memory = 20.0 * size / DEVICE_BYTES
    nanoseconds = 2 * LAUNCH + max(memory, products) + min(memory, products) / 4 + _across(columns, lines, across)
    return HighPassGpuPlan("complement", 1, removed, 0, columns, across, 8 * columns * lines, nanoseconds)


def _whole_plan(size: int, removed: float) -> HighPassGpuPlan:
    return HighPassGpuPlan("whole", 1, removed, 0, 0, "cufft", 12 * size, 12 * LAUNCH + 90.0 * size / DEVICE_BYTES)
