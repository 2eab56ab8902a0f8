"""What has to hold before LoRA adapters are merged: factors are no weights, and have to mean the same to be merged."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from freemerge.checkpoint.bare_adapter import BareAdapter
from freemerge.errors import PlanError, listed
from freemerge.lora_names import is_factor, part_of
from freemerge.methods import Method

# Settings of adapters whose factors are merged that have to be the same, and what they are if they are not given
AGREEING = {
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "target_modules": None,
    "modules_to_save": None,
    "base_model_name_or_path": None,
}
MIXES = (
    "{} would mix A of one adapter with B of another. Give each applied to its base, BASE+ADAPTER, which is exact; add "
    "adapters up exactly with `freemerge experts join`; or merge them by a method of their own (copa, twin_lora)."
)
REMEDY = "Give LoRA adapters of one base, rank and scaling; or apply each to its base, BASE+ADAPTER, and merge models."


def check_factors(method: Method, checkpoints: Sequence, misfits: Sequence[str]) -> None:
    """Raise PlanError where LoRA factors would be merged as if they were weights, or the reverse; all problems at once.

    Args:
        checkpoints: those that tensors are merged of.
        misfits: problems found with their tensors, said of adapters where they do not follow from others.
    """
    if method.merges_adapters:
        first, *others = checkpoints or [None]
        extra = [(name, other) for other in others for name in sorted(other.tensors.keys() - first.tensors.keys())]
        misfits = [*misfits, *(f"{name}: missing from {first.label}, in {other.label}" for name, other in extra)]
        problems, remedy = list(_unlike(checkpoints)) or misfits, REMEDY
    else:
        mixed = [c for c in checkpoints if any(map(is_factor, c.tensors))] if len(checkpoints) > 1 else []
        problems = [f"{checkpoint.label}: factors of a LoRA adapter, no weights" for checkpoint in mixed]
        remedy = MIXES.format(method.name)
    if problems:
        raise PlanError(listed(problems, remedy))


def _unlike(checkpoints: Sequence) -> Iterator[str]:
    for checkpoint in checkpoints:
        parts = [part_of(name) for name in checkpoint.tensors if is_factor(name)]
        if not parts:
            yield f"{checkpoint.label}: no LoRA adapter, it holds no lora_A and lora_B"
        pairs = Counter((part.module, part.part[:-2]) for part in parts)
        for (module, _), count in pairs.items():
            if count < 2:
                yield f"{checkpoint.label}: {module}: an A without a B, or a B without an A"
        if any((part := part_of(name)) and "magnitude" in part.part for name in checkpoint.tensors):
            yield f"{checkpoint.label}: a DoRA adapter; its magnitudes belong to its own weights alone"
    yield from _conflicts([checkpoint for checkpoint in checkpoints if isinstance(checkpoint, BareAdapter)])


def _conflicts(adapters: Sequence[BareAdapter]) -> Iterator[str]:
    """Settings that differ from those of the first."""
    for key in AGREEING if adapters else ():
        first, *others = ((adapter.label, _setting(key, adapter.adapter_config)) for adapter in adapters)
        for label, value in others:
            if value != first[1]:
                yield f"{key}: {first[1]} in {first[0]}, {value} in {label}"


def _setting(key: str, config: dict[str, Any]) -> Any:
    """In a form that is equal where it means the same."""
    value = config.get(key) or AGREEING[key]
    if key == "base_model_name_or_path":
        return value and PurePath(value).name  # wherever it lies
    return sorted(value) if isinstance(value, list) else value
