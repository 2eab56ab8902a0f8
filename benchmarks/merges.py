"""The merges that are compared: what freemerge and, where it has the method, mergekit are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Merge:
    """Parameters hold for every expert.

    experts: how many of the model's are merged; None: all.
    base: whether the method reads the base.
    mergekit: whether mergekit has it, under the same name with the same parameters.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    experts: int | None = None
    base: bool = True
    mergekit: bool = False


# By the name under which they are reported
MERGES = {
    "task_arithmetic": Merge("task_arithmetic", {"weight": 0.3}, mergekit=True),
    "average": Merge("linear", {"weight": 1.0}, base=False, mergekit=True),
    "fr": Merge("fr", {"align": False}),
    "fr_align": Merge("fr", {"align": True}),
    "free": Merge("free", {"density": 0.01}),
    "ties": Merge("ties", {"weight": 1.0, "density": 0.2}, mergekit=True),
    "breadcrumbs_ties": Merge("breadcrumbs_ties", {"weight": 0.3, "density": 0.9, "gamma": 0.01}, mergekit=True),
    "ties_merging": Merge("ties_merging", {"density": 0.2}),
    "dare_ties": Merge("dare_ties", {"weight": 0.3, "density": 0.5}, mergekit=True),
    "della": Merge("della", {"weight": 0.3, "density": 0.5, "epsilon": 0.15}, mergekit=True),
    "sce": Merge("sce", {"select_topk": 0.2}, mergekit=True),
    "model_stock": Merge("model_stock", mergekit=True),
    "slerp": Merge("slerp", {"t": 0.5}, experts=1, mergekit=True),
    "nuslerp": Merge("nuslerp", {"weight": 1.0}, experts=2, base=False, mergekit=True),
    "pcb": Merge("pcb", {"density": 0.2}),
    "emr": Merge("emr"),
}
