"""A picture of task vectors' spectra: what the high-pass filter removes, and how much of their energy that is."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freemerge.checkpoint.reader import Checkpoint
from freemerge.errors import InputError, UnavailableError
from freemerge.kernels.array import Array, is_float, task_vector
from freemerge.kernels.high_pass import InnerRing, RadiusFrom, mask_reference, radii

MOST_SHAPES, MOST_MODELS = 2, 3  # rows and columns of images
LARGEST = 1 << 24  # elements: a spectrum is the one thing here that holds a whole complex matrix
PIXELS = 256  # a side of an image at most; larger spectra are averaged in blocks
CURVE_POINTS = 400
REMOVED = (0.21, 0.88, 1.0)
_TINY = float(np.finfo(np.float32).tiny)


def draw_spectra(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    out: Path,
    *,
    cutoff: float = 0.7,
    radius_from: RadiusFrom = "min",
    inner_ring: InnerRing = "clean",
) -> None:
    """Write a PNG: matrices of the two commonest shapes, spectra of up to three task vectors, their energy by cutoff.

    Images have frequency 0 in the middle and are relative to their own median. The curves say which share of the energy
    is kept at every cutoff; the dashed one, which share of the coefficients is, as would be of white noise's energy.

    Raises:
        UnavailableError: matplotlib is not installed.
        InputError: there is no matrix of at most 2^24 elements.
    """
    plt = _pyplot()
    models = list(models)[:MOST_MODELS]
    names = commonest_matrices(base)
    labels = [Path(model.label).name for model in models]
    figure, axes = plt.subplots(
        len(names),
        len(models) + 1,
        figsize=(2.7 * len(models) + 4.2, 2.9 * len(names) + 0.6),
        width_ratios=[1] * len(models) + [1.35],
        squeeze=False,
        layout="constrained",
    )
    for row, name in zip(axes, names, strict=True):
        powers = [power_spectrum(base.read(name), model.read(name)) for model in models]
        mask = mask_reference(powers[0].shape, cutoff, radius_from, inner_ring)
        for axis, power, label in zip(row, powers, labels, strict=False):
            _draw_image(axis, power, mask)
            axis.set_title(label, fontsize=10)
        row[0].set_ylabel("\n".join([*_two_lines(name), " x ".join(map(str, mask.shape))]), fontsize=8)
        _draw_curves(row[-1], powers, labels, cutoff, radius_from)
    figure.suptitle(
        f"Task vectors in frequency: the filter removes what is outlined (cutoff {cutoff:g}, radius from {radius_from})"
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnavailableError(f"pictures need matplotlib ({error}): pip install 'freemerge[plots]'") from error
    matplotlib.use("Agg")
    return plt


def commonest_matrices(checkpoint: Checkpoint) -> list[str]:
    """The middle one among the matrices of each of the commonest shapes, a shape and its transpose counting as one."""
    groups = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and is_float(info.dtype) and 1 < info.numel <= LARGEST and min(info.shape) > 1:
            groups[tuple(sorted(info.shape))].append(name)
    if not groups:
        raise InputError(f"{checkpoint.label} holds no matrix of at most {LARGEST} elements to draw the spectrum of")
    common = sorted(groups, key=lambda shape: (-len(groups[shape]), shape))[:MOST_SHAPES]
    return [groups[shape][len(groups[shape]) // 2] for shape in common]


def power_spectrum(base: Array, expert: Array) -> Array:
    """|DFT2(expert - base)|^2, [H, W] float32, frequency (0, 0) first."""
    spectrum = np.fft.fft2(task_vector(base, expert)).astype(np.complex64, copy=False)
    return spectrum.real**2 + spectrum.imag**2


def energy_by_cutoff(power: Array, radius_from: RadiusFrom, cutoffs: Array) -> Array:
    """The share of `power` that a filter of each cutoff keeps; the small inner ring, which is always kept, aside."""
    rows, columns = power.shape
    u, v = np.ogrid[:rows, :columns]
    distance = np.hypot(u - rows // 2, v - columns // 2).astype(np.float32)
    edges = np.append(cutoffs * radii(power.shape, 1.0, radius_from)[0], np.inf)
    inside = np.histogram(distance, np.concatenate([[-1.0], edges]), weights=power.astype(np.float64))[0].cumsum()
    return inside[:-1] / max(inside[-1], _TINY)


def _draw_image(axis, power: Array, mask: Array) -> None:
    power, removed = _in_blocks(np.fft.fftshift(power)), _in_blocks(np.fft.fftshift(mask == 0)) > 0.5
    decibels = 10 * np.log10(np.maximum(power / max(np.median(power), _TINY), 1e-6))
    axis.imshow(decibels, cmap="magma", vmin=-12, vmax=18, aspect="auto", interpolation="nearest")
    if removed.any() and not removed.all():
        shade = np.zeros((*removed.shape, 4), np.float32)
        shade[removed] = (*REMOVED, 0.18)
        axis.imshow(shade, aspect="auto", interpolation="nearest")
        axis.contour(removed, levels=[0.5], colors=[REMOVED], linewidths=1.2)
    axis.set(xticks=[], yticks=[])


def _in_blocks(values: Array) -> Array:
    """`values` averaged so that no side is longer than PIXELS."""
    for axis, size in enumerate(values.shape):
        starts = np.linspace(0, size, min(size, PIXELS), endpoint=False).astype(np.int64)
        counts = np.diff(np.append(starts, size)).reshape((-1, 1) if axis == 0 else (1, -1))
        values = np.add.reduceat(values.astype(np.float32), starts, axis=axis) / counts
    return values


def _draw_curves(axis, powers: Sequence[Array], labels: Sequence[str], cutoff: float, radius_from: RadiusFrom) -> None:
    shape = powers[0].shape
    farthest = np.hypot(*(size // 2 for size in shape)) / radii(shape, 1.0, radius_from)[0]
    cutoffs = np.linspace(0, farthest, CURVE_POINTS)
    for power, label in zip(powers, labels, strict=True):
        axis.plot(cutoffs, energy_by_cutoff(power, radius_from, cutoffs), label=label, linewidth=1.6)
    flat = energy_by_cutoff(np.ones(shape, np.float32), radius_from, cutoffs)
    axis.plot(cutoffs, flat, "--", color="0.45", label="coefficients", linewidth=1.1)
    axis.axvspan(min(cutoff, farthest), farthest, color=REMOVED, alpha=0.22, linewidth=0, label="removed")
    axis.set(xlim=(0, farthest), ylim=(0, 1.01), xlabel="cutoff", ylabel="share kept")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)


def _two_lines(name: str) -> list[str]:
    middle = name.find(".", len(name) // 2)
    return [name] if len(name) < 24 or middle < 0 else [name[: middle + 1], name[middle + 1 :]]
