"""What the high-pass mask keeps, found column by column without building it, and the form of the filter that suits it.

The mask of METHODS.md section 1.1 depends on the squared distance s = (u - H//2)^2 + (v - W//2)^2 only, and not
decreasingly so after its float32 roundings: three integers hold all of it (`_thresholds`). For a column v it is then a
function of |u - H//2| by three more (`column_bounds`), which is all the compiled op needs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from freemerge.errors import RecipeError, ShapeError

RadiusFrom = Literal["min", "max", "diagonal"]
InnerRing = Literal["official", "clean"]

LANES = 16  # as in csrc/include/freemerge/fft.h
MOST_WORKSPACE = 512 << 20  # bytes: speed is worth that much memory, and no more if there is a way around it


@dataclass(frozen=True)
class HighPassPlan:
    """How a matrix of one shape is filtered.

    Attributes:
        form: "keep" (nothing is removed: no transform), "complement" (subtract the few coefficients removed, by direct
            sums) or "sweeps" (transform all lines, and across the lines only the columns the mask cuts).
        axis: 1 where the lines are rows, 0 where they are columns.
        removed: coefficients of the H x W mask with gain 0.
        doubled: coefficients with gain 2 (inner_ring official).
        mixed: columns of the lines' half spectrum that are transformed across the lines.
        stored: whether the kept columns are held in the workspace between the sweeps.
        workspace: bytes shared by all threads.
        per_thread: bytes each thread adds to that.
        nanoseconds: predicted, one thread, two-byte inputs of three experts.
    """

    form: Literal["keep", "complement", "sweeps"]
    axis: Literal[0, 1]
    removed: int
    doubled: int
    mixed: int
    stored: bool
    workspace: int
    per_thread: int
    nanoseconds: float
    size: int

    def describe(self) -> str:
        """A line for `--dry-run`."""
        share = f"removes {self.removed / self.size:.3%}" if self.removed else "removes nothing"
        how = {
            "keep": "no transform",
            "complement": f"complement, {self.mixed} columns",
            "sweeps": f"two sweeps over {('columns', 'rows')[self.axis]}, {self.mixed} columns across",
        }[self.form]
        pace = self.nanoseconds / max(self.size, 1)
        return f"{share}; {how}; {self.workspace / 2**20:.1f} MiB; {pace:.1f} ns an element"


@lru_cache(maxsize=1024)
def plan_high_pass(
    shape: tuple[int, int], *, cutoff: float = 0.7, radius_from: RadiusFrom = "min", inner_ring: InnerRing = "clean"
) -> HighPassPlan:
    """Choose the form and the axis of the filter for a matrix H x W: the cheapest by a model of its cost.

    Raises:
        RecipeError: `cutoff` is negative or not a number, or a name is unknown.
    """
    mask = (tuple(int(size) for size in shape), float(cutoff), radius_from, inner_ring)
    return min(possible_plans(*mask), key=lambda plan: (max(plan.workspace, MOST_WORKSPACE), plan.nanoseconds))


def possible_plans(
    shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing
) -> list[HighPassPlan]:
    """Every form that gives the right answer, for the choice and for tests."""
    check_parameters(cutoff, radius_from, inner_ring)
    if len(shape) != 2:
        raise ShapeError(f"the high-pass filter takes matrices, not {list(shape)}")
    if 0 in shape:
        return [HighPassPlan("keep", 1, 0, 0, 0, False, 0, 0, 0.0, 0)]
    removed, doubled = _counts(shape, cutoff, radius_from, inner_ring)
    plans = []
    for axis in (0, 1):
        length, lines = shape[axis], shape[1 - axis]
        kept, mixed, dropped = _column_counts(column_bounds(shape, axis, cutoff, radius_from, inner_ring), lines)
        if axis == 1 and 4 * removed <= length * lines:  # a small difference of large numbers is not accurate
            plans.append(_complement_plan(length, lines, mixed + dropped, removed, doubled))
        plans.extend(_sweeps_plans(axis, length, lines, kept, mixed, removed, doubled))
    return plans


def check_parameters(cutoff: float, radius_from: str, inner_ring: str) -> None:
    if not cutoff >= 0:
        raise RecipeError(f"cutoff {cutoff}: a share of the radius is wanted, 0 or more")
    if radius_from not in ("min", "max", "diagonal"):
        raise RecipeError(f"radius_from {radius_from!r}: there is min, max and diagonal")
    if inner_ring not in ("official", "clean"):
        raise RecipeError(f"inner_ring {inner_ring!r}: there is official and clean")


# ---- the mask ----


def radii(shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom) -> tuple[np.float32, int]:
    """R and rho of METHODS.md section 1.1: the outer radius, rounded as officially, and that of the inner ring."""
    of = (
        math.sqrt((shape[0] / 2) ** 2 + (shape[1] / 2) ** 2)
        if radius_from == "diagonal"
        else {"min": min, "max": max}[radius_from](shape)
    )
    with np.errstate(over="ignore"):
        return np.float32(cutoff * of), min(shape) // 10


def _thresholds(
    shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing
) -> tuple[int, int, int]:
    """(inner, below, outer): the gain at squared distance s is [s <= inner] + [below < s <= outer]."""
    outer_radius, ring_radius = radii(shape, cutoff, radius_from)
    farthest = (shape[0] // 2) ** 2 + (shape[1] // 2) ** 2

    def last(holds) -> int:  # the last s for which it holds, if it does up to there and no further
        low, high = -1, farthest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(np.sqrt(np.float32(middle))) else (low, middle - 1)
        return low

    within_outer = last(lambda distance: distance <= outer_radius)
    within_inner = last(lambda distance: distance <= ring_radius)
    if inner_ring == "clean":
        return max(within_inner, within_outer), farthest, farthest
    return within_inner, last(lambda distance: distance < ring_radius), within_outer


@lru_cache(maxsize=256)
def column_bounds(
    shape: tuple[int, int], axis: int, cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing
) -> np.ndarray:
    """[3, length] int32 (inner, below, outer). With d = |u - lines//2| the gain is [d <= inner] + [below < d <= outer].

    `v` counts along the lines (axis 1: they are rows), `u` across them. -1 where there is no such d.
    """
    length, lines = shape[axis], shape[1 - axis]
    squares = (np.arange(length, dtype=np.int64) - length // 2) ** 2
    limits = np.array(_thresholds(shape, cutoff, radius_from, inner_ring), np.int64)[:, None] - squares
    bounds = np.minimum(np.where(limits < 0, -1, _integer_root(np.maximum(limits, 0))), lines // 2).astype(np.int32)
    bounds.flags.writeable = False
    return bounds


def _integer_root(values: np.ndarray) -> np.ndarray:
    root = np.sqrt(values.astype(np.float64)).astype(np.int64)
    root -= root * root > values
    return root + ((root + 1) ** 2 <= values)


def _counts(shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing) -> tuple[int, int]:
    inner, below, outer = column_bounds(shape, 1, cutoff, radius_from, inner_ring).astype(np.int64)
    rows, columns = shape

    def within(bound):  # how many u have |u - rows//2| <= bound
        return np.clip(2 * bound + 1, 0, rows)

    ring = np.maximum(within(outer) - within(below), 0)
    doubled = np.maximum(within(np.minimum(inner, outer)) - within(below), 0)
    return rows * columns - int((within(inner) + ring - doubled).sum()), int(doubled.sum())


def column_kinds(bounds: np.ndarray, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """Which columns have gain 1, and which have gain 0: [length] bool each. The others have more than one gain."""
    inner, below, outer = bounds
    ring = outer > below
    keep = np.where(ring, (inner == below) & (outer == lines // 2), inner == lines // 2)
    drop = (inner < 0) & ~ring
    mirrored = -np.arange(bounds.shape[1]) % bounds.shape[1]
    return keep & keep[mirrored], drop & drop[mirrored]


def _column_counts(bounds: np.ndarray, lines: int) -> tuple[int, int, int]:
    """Columns with gain 1; of the half spectrum, columns with more than one gain, and columns with gain 0."""
    keep, drop = column_kinds(bounds, lines)
    half = slice(bounds.shape[1] // 2 + 1)
    return int(keep.sum()), int((~keep & ~drop)[half].sum()), int(drop[half].sum())


# ---- what it costs: nanoseconds, one thread, fitted with benchmarks/bench_high_pass.py ----

STREAM = 0.75, 0.6  # an element, read (base and three experts) and written (base and output), row after row
COLUMNS = 1.7, 1.4  # the same in groups of lines that are columns
ROWS = 1.1, 0.8  # and that are rows
PRODUCT = 0.035  # an element and a column of the complement
STORE = 1.2  # a real number of the kept columns, out and back
ACROSS = 1.5  # a real number of the columns transformed across the lines, besides its transforms
RADIX = {3: 0.09, 5: 0.14, 7: 0.18, 8: 0.13, 11: 0.25, 13: 0.30}  # a butterfly's share of one real number


def _transform(n: int) -> float:
    """Nanoseconds for each real number of a transform of length n."""
    cost, twos = 0.0, 0
    while n % 2 == 0:
        n, twos = n // 2, twos + 1
    cost += twos / 3 * RADIX[8]
    for radix in range(3, 62, 2):
        while n % radix == 0:
            n, cost = n // radix, cost + RADIX.get(radix, 0.025 * radix)
    if n > 1:
        cost += 2 * _padded(n) / n * (_transform(_padded(n)) + 0.1)
    return cost


def _padded(n: int) -> int:
    return 1 << (2 * n - 2).bit_length()


def _point_bytes(
    length: int,
) -> int:  # a transform of LANES complex lines, with what Bluestein's algorithm needs beside it
    rest = length
    for factor in (2, *range(3, 62, 2)):
        while rest % factor == 0:
            rest //= factor
    return 8 * LANES * (length + (_padded(rest) if rest > 1 else 0))


def _across(columns: int, lines: int) -> tuple[int, float]:
    """(bytes, nanoseconds) of the columns that are transformed across the lines."""
    padded = -(-columns // LANES) * LANES
    return 8 * padded * lines, padded * lines * 2 * (2 * _transform(lines) + ACROSS)


def _complement_plan(length: int, lines: int, columns: int, removed: int, doubled: int) -> HighPassPlan:
    size = length * lines
    workspace, across = _across(columns, lines)
    products = size * columns * 2 * PRODUCT
    passes = 2 if columns else 1
    read, write = STREAM
    return HighPassPlan(
        "complement" if columns else "keep",
        1,
        removed,
        doubled,
        columns,
        False,
        workspace,
        max(_point_bytes(lines), 4 * 3 * 24 * length),
        size * (passes * read + write) + products + across,
        size,
    )


def _sweeps_plans(
    axis: int, length: int, lines: int, kept: int, mixed: int, removed: int, doubled: int
) -> list[HighPassPlan]:
    size = length * lines
    workspace, across = _across(mixed, lines)
    store = 8 * LANES * kept * -(-lines // (2 * LANES))
    at_once = 1 if axis == 1 else 4 if length <= 16384 else 2  # groups of lines, as in csrc/cpu/high_pass_lines.cpp
    per_thread = max(at_once * _point_bytes(length), _point_bytes(lines))
    read, write = ROWS if axis == 1 else COLUMNS
    twice = size * (2 * read + write + 3 * _transform(length)) + across
    once = size * (read + write + 2 * _transform(length)) + across + lines * kept * STORE
    return [
        HighPassPlan("sweeps", axis, removed, doubled, mixed, False, workspace, per_thread, twice, size),
        HighPassPlan("sweeps", axis, removed, doubled, mixed, True, workspace + store, per_thread, once, size),
    ]
