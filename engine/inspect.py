"""What models hold, how far fine-tuning moved them, and what the high-pass filter would remove."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path

import numpy as np

from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.errors import InputError, PlanError, listed
from freemerge.kernels.array import Array, is_float, task_vector
from freemerge.kernels.high_pass import InnerRing, RadiusFrom, high_pass, plan_high_pass
from freemerge.kernels.task_vector_statistics import task_vector_statistics

RUN = 1 << 20  # elements looked at at a time: bounds the float32 and bool arrays held


@dataclass
class Row:
    """One tensor of one model, or with `tensor` "(total)" all of them.

    Attributes:
        model: as the user wrote it.
        shape: None in a total of several tensors.
        nbytes: stored bytes.
        rms, max_abs: root mean square and largest magnitude of the task vector (model minus base).
        unchanged: share of the elements that equal the base's.
        coefficients_removed: share of the spectrum's coefficients with gain 0; matrices only.
        energy_removed: ||tau - F(tau)||^2 / ||tau||^2, F the high-pass filter; matrices only.

    What needs a base is None without one; shares run from 0 to 1. A total's energy_removed is a share of the energy of
    all tensors, matrices or not.
    """

    model: str
    tensor: str
    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int
    rms: float | None = None
    max_abs: float | None = None
    unchanged: float | None = None
    coefficients_removed: float | None = None
    energy_removed: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def inspect_models(
    models: Sequence[str],
    base: str | None = None,
    *,
    cutoff: float = 0.7,
    radius_from: RadiusFrom = "min",
    inner_ring: InnerRing = "clean",
    spectrum: Path | None = None,
    allow_pickle: bool = False,
) -> list[Row]:
    """Look at every tensor of every model; with a base, at its task vector and at what the filter removes from it.

    Every matrix is looked at, embeddings and heads too, which `fr` and `free` leave unfiltered by default. Memory: four
    bytes for each element of the largest matrix, and the filter's workspace; more for a picture.

    Args:
        models: folders, files or hub names.
        base: the same; None for tensors, dtypes and sizes alone.
        cutoff, radius_from, inner_ring: of the filter, see kernels/high_pass.py.
        spectrum: write a picture of the task vectors' spectra to this PNG file; needs a base and matplotlib.
        allow_pickle: read .bin and .pt files too (torch, weights only).

    Raises:
        CheckpointError: a model cannot be read.
        PlanError: a model's tensors have other names or shapes than the base's.
        UnavailableError: a picture is asked for and matplotlib is not here.
    """
    if spectrum is not None and base is None:
        raise InputError("a spectrum is one of task vectors: name the base (--base)")
    opened = [open_checkpoint(model, allow_pickle=allow_pickle, base=base) for model in models]
    if base is None:
        return [row for model in opened for row in _with_total(_contents(model))]
    start = open_checkpoint(base, allow_pickle=allow_pickle)
    _check_alike(start, opened)
    mask = {"cutoff": cutoff, "radius_from": radius_from, "inner_ring": inner_ring}
    if spectrum is not None:
        from freemerge.spectrum import draw_spectra

        draw_spectra(start, opened, spectrum, **mask)
    return [row for model in opened for row in _task_vector_rows(start, model, mask)]


def _contents(model: Checkpoint) -> list[Row]:
    return [Row(model.label, name, str(info.dtype), info.shape, info.nbytes) for name, info in model.tensors.items()]


def _with_total(rows: list[Row]) -> list[Row]:
    return [*rows, Row(rows[0].model, "(total)", _dtypes(rows), None, sum(row.nbytes for row in rows))]


def _dtypes(rows: list[Row]) -> str:
    return ", ".join(sorted({row.dtype for row in rows}))


def _check_alike(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    problems = []
    for model in models:
        for name in sorted(base.tensors.keys() ^ model.tensors.keys()):
            problems.append(f"{name}: not in {base.label if name in model.tensors else model.label}")
        for name in sorted(base.tensors.keys() & model.tensors.keys()):
            ours, theirs = base.tensors[name].shape, model.tensors[name].shape
            if ours != theirs:
                problems.append(f"{name}: {list(ours)} in the base, {list(theirs)} in {model.label}")
    if problems:
        raise PlanError(listed(problems, "Inspect models of one architecture, or leave out --base."))


def _task_vector_rows(base: Checkpoint, model: Checkpoint, mask: dict) -> list[Row]:
    rows, moved = _contents(model), []
    for row in rows:
        if is_float(base.tensors[row.tensor].dtype) and is_float(model.tensors[row.tensor].dtype) and prod(row.shape):
            _measure(row, base.read(row.tensor), model.read(row.tensor), mask)
            base.release(row.tensor)
            model.release(row.tensor)
            moved.append(row)
    return [*rows, _moved_total(_with_total(rows)[-1], moved)]


def _measure(row: Row, base: Array, expert: Array, mask: dict) -> None:
    statistics = task_vector_statistics(base, [expert])
    squares = float(statistics.sum_squares[0])
    row.rms, row.max_abs = sqrt(squares / base.size), float(statistics.max_abs[0])
    row.unchanged = _count_equal(base, expert) / base.size
    if base.ndim == 2:
        row.coefficients_removed = plan_high_pass(row.shape, **mask).removed / base.size
        row.energy_removed = removed_energy(base, expert, **mask) / squares if squares else 0.0


def _moved_total(total: Row, moved: list[Row]) -> Row:
    if not moved:
        return total
    sizes = [prod(row.shape) for row in moved]
    squares = [row.rms**2 * size for row, size in zip(moved, sizes, strict=True)]
    total.rms, total.max_abs = sqrt(sum(squares) / sum(sizes)), max(row.max_abs for row in moved)
    total.unchanged = sum(row.unchanged * size for row, size in zip(moved, sizes, strict=True)) / sum(sizes)
    removed = sum((row.energy_removed or 0.0) * square for row, square in zip(moved, squares, strict=True))
    total.energy_removed = removed / sum(squares) if any(squares) else 0.0
    return total


def removed_energy(
    base: Array, expert: Array, *, cutoff: float = 0.7, radius_from: RadiusFrom = "min", inner_ring: InnerRing = "clean"
) -> float:
    """||tau - F(tau)||^2 of a matrix, tau = expert - base [H, W], F the high-pass filter; summed in float64."""
    if plan_high_pass(base.shape, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring).form == "keep":
        return 0.0
    kept = np.empty(base.shape, np.float32)
    mask = {"cutoff": cutoff, "radius_from": radius_from, "inner_ring": inner_ring}
    high_pass(base, [expert], [1.0], **mask, add_base=False, out=kept)
    return sum(
        float(np.sum(np.square(task_vector(b, e) - k, dtype=np.float64))) for b, e, k in _runs(base, expert, kept)
    )


def _count_equal(base: Array, expert: Array) -> int:
    return sum(int(np.count_nonzero(b == e)) for b, e in _runs(base, expert))


def _runs(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    for begin in range(0, arrays[0].size, RUN):
        yield tuple(array.reshape(-1)[begin : begin + RUN] for array in arrays)
