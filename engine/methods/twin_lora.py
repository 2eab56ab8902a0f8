"""Twin-Merging of LoRA adapters: a shared adapter, and for each expert what its factors hold beyond it, of a low rank.

    shared = scaling * sum_t F_t,  for each factor F, an A or a B;   E_t = the best approximation of F_t - shared

A and B are compressed each for itself, the variant `lora_fixed_rank` of METHODS.md section 7. With its expert in it,
`freemerge experts apply SHARED math OUT`, the shared adapter is nearly the one that was given.
"""

import math
from collections.abc import Sequence

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, task_vector
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.lora_names import is_factor
from freemerge.methods import TensorPlan
from freemerge.methods._linear_algebra import triplets
from freemerge.methods._task_vectors import DENSE
from freemerge.parts import Cut, Difference, Layout, LowRank, Part

SCOPE = "tensor"
SOURCE = "Twin-Merging, Lu et al. 2024, arXiv:2406.15479; METHODS.md section 7"
USES_BASE = False
MERGES_ADAPTERS = True
WRITES_EXPERTS = True
DESCRIBED = ("rank",)
ALIASES = {"lambda": "scaling", "new_rank": "rank"}


def merge_tensor(
    base: None, experts: Sequence[Array], *, name: str, rank: int = 8, scaling: float = 0.3, out: Array
) -> None:
    """Write scaling times the sum of a factor, or the mean of a tensor that is none.

    Both factors are sums, so in the shared adapter A of one expert meets B of another: that is the method.

    Args:
        rank: of what an expert keeps of a factor; factors for which that is no smaller are kept whole, as are tensors
            that are no matrices or no factors.
        scaling: the coefficient on the sum of a factor.
    """
    weight = scaling if is_factor(name) else 1 / len(experts)
    weighted_sum(experts, [weight] * len(experts), out=out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, rank: int, **_) -> TensorPlan:
    if rank < 1:
        raise RecipeError(f"rank: {rank} is not a rank; give a whole number from 1 on")
    held = _planned(name, shape, rank)
    own = sum(math.prod(sides) * np.dtype(dtype).itemsize for dtype, sides in held.arrays.values())
    done = "scaled sum" if is_factor(name) else "mean"
    return TensorPlan("merge", f"{done}; experts: {held.kind}", experts * own + DENSE * math.prod(shape))


def plan_expert(name: str, shape: tuple[int, ...], dtype: np.dtype, *, rank: int, **_) -> Layout:
    return _planned(name, shape, rank)


def cut_experts(base: None, merged: Array, experts: Sequence[Array], *, name: str, rank: int, within=None, **_) -> Cut:
    layout = _planned(name, tuple(merged.shape), rank)
    return Cut([_compressed(merged, expert, layout) for expert in experts], [{} for _ in experts])


def _planned(name: str, shape: tuple[int, ...], rank: int) -> Layout:
    smaller = len(shape) == 2 and rank * sum(shape) < math.prod(shape) and rank < min(shape)
    return LowRank.planned(shape, rank) if smaller and is_factor(name) else Difference.planned(shape)


def _compressed(merged: Array, expert: Array, layout: Layout) -> Part:
    vector = task_vector(merged, expert)
    if layout.kind == "difference":
        return Difference(vector, layout.shape)
    return LowRank.of_triplets(triplets(vector, layout.arrays["left"][1][1]), layout.shape)
