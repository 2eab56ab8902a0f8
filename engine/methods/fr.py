"""FR-Merging: high-pass filter every task vector, sum them, add the sum to the base.

The filter F is linear, so without align and elect it is done once, on the sum, whatever the number of experts. Only
matrices (2-D) are filtered; 1-D tensors, convolutions and 0-d tensors never are. What the filter removes depends on a
matrix's shape far more than on the cutoff: see [filter.md](filter.md), also for the variants, which are those of the
authors' code.
"""

from collections.abc import Sequence
from typing import Literal

from freemerge.kernels.array import Array
from freemerge.methods import Patterns, PerExpert, TensorPlan
from freemerge.methods._backbone import EMBEDDINGS_AND_HEADS, Backbone
from freemerge.methods._backbone import fit_expert as fit_expert

SCOPE = "tensor"
SOURCE = "FREE-Merging, Zheng and Wang 2024, arXiv:2411.16815; METHODS.md section 1"
ALIASES = {"lambda": "scaling"}

# The five versions in the authors' repository Zhengsh123/FREE-Merging, quirks included
VARIANTS = {
    "vit8": {
        "inner_ring": "official",
        "align": True,
        "scaling": 0.7,
        "include": ("attn", "mlp"),
        "filter": ("(attn|mlp).*weight", "weight.*(attn|mlp)"),
        "unfiltered": (),
        "bias_rule": "first",
    },
    "vit30": {
        "inner_ring": "official",
        "scaling": 0.15,
        "include": ("attention", "output", "intermediate"),
        "filter": ("(attention|output|intermediate).*weight", "weight.*(attention|output|intermediate)"),
        "unfiltered": (),
    },
    "roberta": {
        "inner_ring": "official",
        "scaling": 0.5,
        "exclude": ("classifier",),
        "unfiltered": (),
        "bias_rule": "base",
    },
    "script": {
        "cutoff": 0.6,
        "radius_from": "max",
        "inner_ring": "official",
        "scaling": 0.4,
        "exclude": ("classifier", "bias"),
        "unfiltered": (),
    },
    "llm": {
        "cutoff": 0.9,
        "inner_ring": "official",
        "elect": True,
        "weight": 0.8,
        "scaling": 1.1,
        "filter": (".",),
        "unfiltered": (),
        "crop": True,
    },
}


def merge_tensor(
    base: Array,
    experts: Sequence[Array | None],
    *,
    name: str,
    weight: PerExpert = 1.0,
    scaling: float = 0.3,
    cutoff: float = 0.7,
    radius_from: Literal["min", "max", "diagonal"] = "min",
    inner_ring: Literal["official", "clean"] = "clean",
    align: bool = False,
    elect: bool = False,
    normalize: bool = False,
    include: Patterns = (),
    exclude: Patterns = (),
    filter: Patterns = ("weight",),
    unfiltered: Patterns = EMBEDDINGS_AND_HEADS,
    bias_rule: Literal["sum", "first", "base"] = "sum",
    crop: bool = False,
    out: Array,
) -> None:
    """Write base + scaling * sum_t weight[t] * F(experts[t] - base), F the high-pass filter where a tensor is filtered.

    Args:
        weight: weight of the expert's task vector.
        scaling: the coefficient on the sum.
        cutoff: radius around the highest frequency that is kept, as a ratio of a side of the matrix. Nothing in a
            square matrix is further away than 0.7071.
        radius_from: the side cutoff is a ratio of: the shorter (min), the longer (max), or half the diagonal, which
            removes alike from every shape.
        inner_ring: official doubles the frequencies on a small circle, a slip of the authors' code; clean does not.
        align: scale the task vectors of a tensor up to the largest mean magnitude among the experts.
        elect: sum only the entries whose sign agrees with the sign of the weighted sum.
        normalize: divide by the sum of the weights; with elect, by those that agree.
        include: merge only tensors with one of these in their names; all if empty. Others stay as in the base.
        exclude: tensors with one of these in their names stay as in the base.
        filter: filter matrices with one of these in their names.
        unfiltered: but not those with one of these; by default embeddings and heads, which it would almost erase.
        bias_rule: what becomes of merged tensors that are not filtered: the sum of all experts, the first expert's,
            or as in the base.
        crop: take the base's rows and columns of larger lm_head and embed_tokens, and leave an expert out of any
            other tensor in which its shape differs, rather than refuse to merge.
    """
    Backbone.of(locals()).merge(base, experts, name, out)


def plan_tensor(name: str, shape: tuple[int, ...], *, experts: int, **parameters) -> TensorPlan:
    return Backbone.of(parameters).plan(name, shape, experts)
