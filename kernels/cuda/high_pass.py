"""high_pass in CUDA C++: rows are transformed in shared memory, which Triton has no way to shuffle through.

The form "complement" is two skinny products, and those are Triton's (kernels/triton/_low_pass.py), as is "keep".
"""

from collections.abc import Sequence

import torch

from freemerge.kernels._high_pass_plan import InnerRing, RadiusFrom
from freemerge.kernels.cuda._high_pass import Sum, Sweeps, exact, filter_whole, plan_for, target_for
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
    mask = (cutoff, radius_from, inner_ring)
    plan = plan_for(out, mask)
    if plan.form == "keep" or not experts:
        write_sum(base, experts, weights, add_base, out)
        return
    values, added = Sum.of(base, experts, weights), exact(base) if add_base else None
    target = target_for(out, added)
    if plan.form == "sweeps":
        Sweeps(plan, values, mask).write(added, target)
    else:
        filtered = filter_whole(values, mask)
        target.copy_(filtered if added is None else added + filtered)
    if target is not out:
        out.copy_(target)


def write_sum(base, experts, weights, add_base: bool, out: torch.Tensor) -> None:
    """Nothing is removed: base plus the weighted sum of the task vectors, or that sum alone."""
    if base is None:
        weighted_sum(experts, weights, out)
    elif add_base:
        add_task_vectors(base, experts, weights, out)
    else:
        out.copy_(Sum.of(base, experts, weights).in_torch() if experts else torch.zeros_like(out))
