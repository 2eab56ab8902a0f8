"""high_pass in CUDA C++: rows are transformed in shared memory, which Triton has no way to shuffle through.

The form "complement" is two skinny products, and those are Triton's (kernels/triton/_low_pass.py), as is "keep".
"""

from collections.abc import Sequence

import torch

from freemerge.kernels._high_pass_plan import InnerRing, RadiusFrom
from freemerge.kernels.cuda._high_pass import Sum, Sweeps, filter_by_complement, filter_whole, plan_for
from freemerge.kernels.triton._convert import storable, store
from freemerge.kernels.triton.add_task_vectors import add_task_vectors
from freemerge.kernels.triton.weighted_sum import weighted_sum


def high_pass(
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    cutoff: float,
    radius_from: RadiusFrom,
    inner_ring: InnerRing,
    add_base: bool,
    out: torch.Tensor,
) -> None:
    if out.numel() == 0:
        return
    if not experts:
        write_sum(base, experts, weights, add_base, out)
        return
    mask, values = (cutoff, radius_from, inner_ring), Sum.of(base, experts, weights)
    plan, added = plan_for(values, mask), values.base if add_base else None
    if plan.form == "keep":
        write_sum(base, experts, weights, add_base, out)
        return
    target = storable(out, added)
    if plan.form == "sweeps":
        Sweeps(plan, values, mask).write(added, target)
    elif plan.form == "complement":
        filter_by_complement(values, mask, add_base, target)
    else:
        filtered = filter_whole(values, mask)
        target = filtered if added is None else added + filtered
    store(target, out)


def write_sum(base, experts, weights, add_base: bool, out: torch.Tensor) -> None:
    """Nothing is removed: base plus the weighted sum of the task vectors, or that sum alone."""
    if base is None:
        weighted_sum(experts, weights, out)
    elif add_base:
        add_task_vectors(base, experts, weights, out)
    else:
        store(Sum.of(base, experts, weights).in_torch() if experts else torch.zeros(out.shape, device=out.device), out)
