"""The names of a LoRA adapter's tensors, as PEFT writes them.

Source: github.com/huggingface/peft, src/peft/tuners/lora and src/peft/utils/save_and_load.py (0.21).
"""

import re
from typing import NamedTuple

_PART = re.compile(r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(.+))?")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


class Part(NamedTuple):
    """One of the tensors that change a module: "lora_B" and "weight" of adapter "default", for instance."""

    module: str
    part: str
    kind: str
    adapter: str


def part_of(name: str) -> Part | None:
    """None for the name of a tensor that stands for itself."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    module, part, rest = match.groups()
    *adapter, kind = rest.split(".") if rest else ["weight"]
    if kind not in ("weight", "bias"):
        adapter, kind = [*adapter, kind], "weight"
    return Part(module, part, kind, ".".join(adapter))


def is_factor(name: str) -> bool:
    """Whether it is A or B of a low-rank update, of an embedding's too."""
    part = part_of(name)
    return part is not None and part.kind == "weight" and part.part.endswith(("_A", "_B"))


def saved_name(name: str) -> str:
    """The name as PEFT saves it: without that of the adapter."""
    part = part_of(name)
    if part is None:
        return _SAVED.sub("", name)
    plain = "embedding" in part.part and part.kind == "weight"
    return f"{part.module}.{part.part}" if plain else f"{part.module}.{part.part}.{part.kind}"
