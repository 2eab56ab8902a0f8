"""high_pass: the filter of FR- and FREE-Merging, applied once to the weighted sum of the task vectors."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels._high_pass_plan import (
    HighPassPlan,
    InnerRing,
    RadiusFrom,
    check_parameters,
    column_bounds,
    plan_high_pass,
    radii,
)
from freemerge.kernels.array import Array, is_tensor, store, task_vector
from freemerge.kernels.checks import check_count, check_like
from freemerge.kernels.dispatch import implementation

__all__ = ["HighPassPlan", "high_pass", "high_pass_reference", "plan_high_pass"]


def high_pass(
    base: Array | None,
    experts: Sequence[Array],
    weights: Sequence[float],
    *,
    cutoff: float = 0.7,
    radius_from: RadiusFrom = "min",
    inner_ring: InnerRing = "clean",
    add_base: bool = True,
    workspace: Array | None = None,
    out: Array,
) -> None:
    """Write base plus the high-pass filtered sum of the task vectors.

        out = round( base + F( sum_t weights[t] * (experts[t] - base) ) )

    F multiplies the two-dimensional spectrum by a mask that keeps what lies within a radius of the Nyquist corner
    (H//2, W//2): it keeps high frequencies and removes those near 0. Being linear, it is applied once whatever the
    number of experts.
    Differences, sum and transform are float32; one rounding, to the dtype of `out`. A float64 base is added in float64.

    Args:
        base: [H, W], any float dtype, contiguous; None where `experts` are task vectors themselves.
        experts: T arrays [H, W], each of any float dtype. T may be 0.
        weights: T numbers, no unit; fold the scaling coefficient in.
        cutoff: the radius, as a share of what `radius_from` says. For a square matrix 0.7072 and more removes nothing.
        radius_from: the shorter side, the longer side, or the distance of the corner from frequency 0.
        inner_ring: "official" doubles the coefficients at distance min(H, W)//10 exactly, as the official code does;
            "clean" does not.
        add_base: False leaves the base out of the result.
        workspace: uint8, of at least `plan_high_pass(...).workspace` bytes; by default taken from buffers kept for the
            purpose. Not looked at on a GPU, where torch keeps the buffers.
        out: [H, W], any float dtype; may be `base` itself.

    Raises:
        ShapeError: an array differs in shape, has not two dimensions, is not contiguous or not of a float dtype, the
            workspace is too small, or weights are too few or too many.
        RecipeError: `cutoff`, `radius_from` or `inner_ring` is not one there is.

    Source: FREE-Merging, arXiv:2411.16815; METHODS.md section 1.1.
    """
    check_matrices(out, base, experts)
    check_count("weights", weights, len(experts), "experts")
    check_parameters(cutoff, radius_from, inner_ring)
    run = implementation("high_pass", out)
    if run is None or is_tensor(out):
        (run or high_pass_reference)(base, experts, weights, cutoff, radius_from, inner_ring, add_base, out)
    else:
        plan = plan_high_pass(out.shape, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring)
        check_workspace(workspace, plan)
        bounds = column_bounds(out.shape, plan.axis, cutoff, radius_from, inner_ring)
        run(base, experts, weights, plan.form, plan.axis, plan.stored, bounds, add_base, workspace, out)


def high_pass_reference(
    base: Array | None,
    experts: Sequence[Array],
    weights: Sequence[float],
    cutoff: float,
    radius_from: RadiusFrom,
    inner_ring: InnerRing,
    add_base: bool,
    out: Array,
) -> None:
    total = np.zeros(out.shape, np.float32)
    for weight, expert in zip(weights, experts, strict=True):
        total += np.float32(weight) * (expert.astype(np.float32) if base is None else task_vector(base, expert))
    filtered = filter_reference(total, cutoff, radius_from, inner_ring)
    store(filtered if base is None or not add_base else base.astype(np.float64) + filtered, out)


def filter_reference(values: Array, cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing) -> Array:
    """F of a real matrix, in float64, with the whole mask."""
    if values.size == 0:
        return values.astype(np.float64)
    gain = mask_reference(values.shape, cutoff, radius_from, inner_ring)
    return np.fft.ifft2(gain * np.fft.fft2(values.astype(np.float64))).real


def mask_reference(shape: tuple[int, int], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing) -> Array:
    """The gain of every coefficient, [H, W]: 0, 1 or 2."""
    outer, ring = radii(shape, cutoff, radius_from)
    u, v = np.ogrid[: shape[0], : shape[1]]
    distance = np.sqrt(((u - shape[0] // 2) ** 2 + (v - shape[1] // 2) ** 2).astype(np.float32))
    if inner_ring == "clean":
        return (distance <= max(outer, np.float32(ring))).astype(np.float64)
    return (distance <= ring).astype(np.float64) + ((ring <= distance) & (distance <= outer))


def check_matrices(like: Array, base: Array | None, experts: Sequence[Array]) -> None:
    check_like("out", like, experts=experts, **({} if base is None else {"base": base}))
    if like.ndim != 2:
        raise ShapeError(f"the high-pass filter takes matrices, not {list(like.shape)}")


def check_workspace(workspace: Array | None, plan: HighPassPlan) -> None:
    if workspace is not None and (workspace.dtype != np.uint8 or workspace.nbytes < plan.workspace):
        raise ShapeError(
            f"workspace is {workspace.nbytes} bytes of {workspace.dtype}; {plan.workspace} of uint8 are needed"
        )
