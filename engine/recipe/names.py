"""What an expert is called in files and messages."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from freemerge.checkpoint.source import split_adapters

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_GENERIC_FILES = {"model", "pytorch_model", "adapter_model", "consolidated"}


def named_experts(pairs: Sequence[tuple[str | None, str]]) -> dict[str, str]:
    """Name -> model for pairs of a name, or None, and a model: nameless ones are named after their folder."""
    taken = {name.lower() for name, _ in pairs if name}
    return {name or new_name(model, taken): model for name, model in pairs}


def same_model(one: str, other: str) -> bool:
    """Whether two recipes' words mean the same path, or the same name."""
    return os.path.normpath(one) == os.path.normpath(other)


def new_name(model: str, taken: set[str]) -> str:
    """The last part of a model's path, made unlike all in `taken`, which it joins."""
    model, adapters = split_adapters(model)
    path = PurePosixPath([model, *adapters][-1].replace(os.sep, "/").partition("@")[0])
    if path.suffix in {".safetensors", ".bin", ".pt", ".pth"}:
        path = path.parent if path.stem in _GENERIC_FILES and path.parent.name else path.with_suffix("")
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name).lstrip(".-") or "expert"
    name, number = word, 1
    while name.lower() in taken:
        number += 1
        name = f"{word}-{number}"
    taken.add(name.lower())
    return name
