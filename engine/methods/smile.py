"""SMILE: the linear layers of all experts as low-rank parts beside the base, and gates that choose among them by input.

For each linear layer (weight W_t, bias b_t), D_t = W_t - W_0 = U_t S_t V_t^T:

    expert t: P_t = U_t[:, :rank], Q_t = (S_t V_t^T)[:rank], bias b_t - b_0;    gate: A_t = V_t[:, :gate_rank]^T
    z_t = |A_t x|;   p = softmax(z);   of the top_k largest, divided by their sum,
    y = W_0 x + b_0 + sum p_t (P_t Q_t x + b_t - b_0)

P_t Q_t and biases are in the experts; the gates of all experts, one below the other, are `gate/TENSOR` in
`experts/shared/smile.safetensors`. In a running model every layer computes y for each token in
`with model.routed(freemerge.routers.Gates()):`, whose reference is freemerge.experts.routed_layer. An expert applied to
the backbone is its task's approximation. A direction whose singular value is at most 1e-6 of the largest is arbitrary
and left zero.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from freemerge.errors import RecipeError
from freemerge.kernels.add_task_vectors import add_task_vectors
from freemerge.kernels.array import Array, empty, task_vector
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.methods import Patterns, TensorPlan, matches
from freemerge.methods._linear_algebra import PIECE, Triplets, triplets
from freemerge.methods._spectral import DECOMPOSITION, PRODUCT
from freemerge.methods._task_vectors import DENSE
from freemerge.parts import Arrays, Cut, Difference, Layout, LowRank, Part

SCOPE = "tensor"
SOURCE = "SMILE, Tang et al. 2024, arXiv:2408.10174; METHODS.md section 8"
WRITES_EXPERTS = True
DESCRIBED = ("rank", "gate_rank", "gate_from", "top_k")
ALIASES = {"k": "rank", "gate_k": "gate_rank"}

LINEAR = (r"(^|\.)(weight|bias)$",)
# what has weights and biases, too, but is no linear layer
EMBEDDINGS_AND_NORMS = ("(?i:norm)", "embed", r"(^|\.)(wte|wpe|shared|ln_?\w*|bn\d*|conv\w*)\.")


def merge_tensor(
    base: Array,
    experts: Sequence[Array],
    *,
    name: str,
    rank: int = 128,
    gate_rank: int = 16,
    top_k: int = 1,
    gate_from: Literal["difference", "weights"] = "difference",
    average_experts: bool = False,
    include: Patterns = LINEAR,
    exclude: Patterns = EMBEDDINGS_AND_NORMS,
    out: Array,
) -> None:
    """Write the base, or where there is no linear layer and if average_experts the mean of the experts.

    Args:
        rank: of the experts' parts; 0 or less keeps their whole differences.
        gate_rank: directions of each expert in the gate; at most the shorter side.
        top_k: how many experts answer an input.
        gate_from: whether the gate has the singular vectors of the difference or of the expert's weights themselves.
        average_experts: of tensors that are in no linear layer, embeddings and norms, take the mean of the experts.
        include: weights (matrices) and biases (1-D) with one of these in their names are those of linear layers.
        exclude: but not those with one of these; by default embeddings, norms and convolutions.
    """
    if average_experts and _is_linear(name, tuple(base.shape), include, exclude) is None:
        weighted_sum(experts, [1 / len(experts)] * len(experts), out=out)
    else:
        add_task_vectors(base, [], [], out=out)


def plan_tensor(
    name: str,
    shape: tuple[int, ...],
    *,
    experts: int,
    rank: int,
    gate_rank: int,
    top_k: int,
    gate_from: str,
    average_experts: bool,
    include: Sequence[str],
    exclude: Sequence[str],
) -> TensorPlan:
    if gate_rank < 1 or not 1 <= top_k <= experts:
        raise RecipeError(
            f"gate_rank is {gate_rank}, top_k {top_k}; give at least 1, and top_k at most {experts} experts"
        )
    layer = _is_linear(name, shape, include, exclude)
    if layer is None:
        return TensorPlan("merge" if average_experts else "copy", "mean" if average_experts else "")
    size, held = math.prod(shape), _planned(layer, shape, rank)
    own = sum(math.prod(sides) * np.dtype(dtype).itemsize for dtype, sides in held.arrays.values())
    if layer == "bias":
        return TensorPlan("merge", "bias of each expert", experts * own)
    n, decompositions = min(shape), experts * (2 if gate_from == "weights" else 1)
    workspace = experts * own + DENSE * (size + experts * gate_rank * shape[1]) + 8 * (4 * n * n + 2 * min(size, PIECE))
    cost = decompositions * (DECOMPOSITION * n**3 + 2 * PRODUCT * n * size)
    return TensorPlan(
        "merge", f"rank {rank} of each expert, gate" if rank > 0 else "differences, gate", workspace, cost
    )


def plan_expert(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    rank: int,
    include: Sequence[str],
    exclude: Sequence[str],
    **_,
) -> Layout | None:
    layer = _is_linear(name, shape, include, exclude)
    return None if layer is None else _planned(layer, shape, rank)


def plan_shared(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    experts: int,
    gate_rank: int,
    include: Sequence[str],
    exclude: Sequence[str],
    **_,
) -> Arrays:
    if _is_linear(name, shape, include, exclude) != "weight":
        return {}
    return {"gate": (np.dtype(np.float32), (experts * min(gate_rank, *shape), shape[1]))}


def cut_experts(
    base: Array,
    merged: Array,
    experts: Sequence[Array],
    *,
    name: str,
    rank: int,
    gate_rank: int,
    gate_from: str,
    include: Sequence[str],
    exclude: Sequence[str],
    within=None,
    **_,
) -> Cut:
    shape, nothing = tuple(base.shape), [{} for _ in experts]
    layer = _is_linear(name, shape, include, exclude)
    if layer is None:
        return Cut([None] * len(experts), nothing)
    if layer == "bias":
        return Cut([Difference(task_vector(base, expert), shape) for expert in experts], nothing)
    height = min(gate_rank, *shape)
    gate = empty((len(experts) * height, shape[1]), np.dtype(np.float32), base)
    parts: list[Part] = []
    for t, expert in enumerate(experts):
        vector = task_vector(base, expert)
        found = triplets(vector, max(rank, height, 0))
        parts.append(Difference(vector, shape) if rank <= 0 else LowRank.of_triplets(_first(found, rank), shape))
        routing = found if gate_from == "difference" else triplets(task_vector(None, expert), height)
        gate[t * height : (t + 1) * height] = routing.right[:, :height].T
    return Cut(parts, nothing, {"gate": gate})


def _is_linear(
    name: str, shape: tuple[int, ...], include: Sequence[str], exclude: Sequence[str]
) -> Literal["weight", "bias"] | None:
    """What a tensor is to a linear layer."""
    if not matches(name, include) or matches(name, exclude) or 0 in shape:
        return None
    return {2: "weight", 1: "bias"}.get(len(shape))


def _planned(layer: str, shape: tuple[int, ...], rank: int) -> Layout:
    return LowRank.planned(shape, min(rank, *shape)) if layer == "weight" and rank > 0 else Difference.planned(shape)


def _first(found: Triplets, rank: int) -> Triplets:
    return Triplets(found.left[:, :rank], found.values[:rank], found.right[:, :rank])
