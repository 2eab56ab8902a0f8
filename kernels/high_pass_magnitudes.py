"""high_pass_magnitudes: how large each task vector is after the high-pass filter."""

from collections.abc import Sequence

import numpy as np

from freemerge.kernels.array import Array, is_tensor, task_vector
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.high_pass import (
    InnerRing,
    RadiusFrom,
    check_matrices,
    check_parameters,
    check_workspace,
    column_bounds,
    filter_reference,
    plan_high_pass,
)


def high_pass_magnitudes(
    base: Array | None,
    experts: Sequence[Array],
    *,
    cutoff: float = 0.7,
    radius_from: RadiusFrom = "min",
    inner_ring: InnerRing = "clean",
    workspace: Array | None = None,
) -> Array:
    """The sum of magnitudes of each filtered task vector.

        result[t] = sum over elements of |F(experts[t] - base)|

    Differences and transform are float32, the sum is float64, in an order that does not depend on the number of
    threads.

    Args:
        base: [H, W], any float dtype, contiguous; None where `experts` are task vectors themselves.
        experts: T arrays [H, W], each of any float dtype.
        cutoff, radius_from, inner_ring, workspace: as in high_pass.

    Returns:
        [T] float64.

    Raises:
        ShapeError, RecipeError: as high_pass.

    Source: the `align` step of FREE-Merging, arXiv:2411.16815; METHODS.md section 1.3.
    """
    check_parameters(cutoff, radius_from, inner_ring)
    if not experts:
        return np.zeros(0)
    check_matrices(experts[0], base, experts)
    run = implementation("high_pass_magnitudes", experts[0])
    if run is None or is_tensor(experts[0]):
        return (run or high_pass_magnitudes_reference)(base, experts, cutoff, radius_from, inner_ring)
    plan = plan_high_pass(experts[0].shape, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring)
    check_workspace(workspace, plan)
    bounds = column_bounds(experts[0].shape, plan.axis, cutoff, radius_from, inner_ring)
    return run(base, experts, plan.form, plan.axis, plan.stored, bounds, workspace)


def high_pass_magnitudes_reference(
    base: Array | None, experts: Sequence[Array], cutoff: float, radius_from: RadiusFrom, inner_ring: InnerRing
) -> Array:
    def magnitude(expert):
        values = expert.astype(np.float32) if base is None else task_vector(base, expert)
        return np.abs(filter_reference(values, cutoff, radius_from, inner_ring)).sum()

    return np.array([magnitude(expert) for expert in experts])
