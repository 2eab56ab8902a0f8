"""high_pass_magnitudes in CUDA C++: the sweeps of high_pass, summed instead of stored; one after another expert."""

from collections.abc import Sequence

import torch

from freemerge.kernels._high_pass_plan import InnerRing, RadiusFrom
from freemerge.kernels.cuda._high_pass import Mask, Sum, Sweeps, filter_by_complement, filter_whole, plan_for


def high_pass_magnitudes(
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    cutoff: float,
    radius_from: RadiusFrom,
    inner_ring: InnerRing,
) -> torch.Tensor:
    mask = (cutoff, radius_from, inner_ring)
    return torch.stack([magnitude(base, expert, mask) for expert in experts])


def magnitude(base: torch.Tensor | None, expert: torch.Tensor, mask: Mask) -> torch.Tensor:
    if expert.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=expert.device)
    values = Sum.of(base, [expert], [1.0])
    plan = plan_for(values, mask)
    if plan.form == "sweeps":
        return Sweeps(plan, values, mask).magnitude()
    if plan.form == "complement":
        filtered = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        filter_by_complement(values, mask, False, filtered)
    else:
        filtered = values.in_torch() if plan.form == "keep" else filter_whole(values, mask)
    return filtered.abs().sum(dtype=torch.float64)
