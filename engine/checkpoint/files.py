"""A checkpoint's files: are they still the same, how to recognise them again, and what lies beside them."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from freemerge.errors import ChangedInputError

# Patterns of the files that a model needs besides its weights. Weights, cards and code are never among them.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor*.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "spiece.*",
    "sentencepiece*",
)
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
    ".py",
    ".md",
)
BLOCKS, BLOCK = 64, 4096  # of a file's content hash


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells a file from its successor without reading it."""

    size: int
    mtime_ns: int
    inode: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "FileState":
        found = os.stat(path)
        return cls(found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))


def states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Of those that are there: reading the others will say it."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = FileState.of(path)
    return found


def check_unchanged(states: dict[Path, FileState]) -> None:
    """Raises ChangedInputError, naming every file that is not the one its state was taken from."""
    problems = []
    for path, state in states.items():
        try:
            if FileState.of(path) != state:
                problems.append(f"{path} changed")
        except OSError as error:
            problems.append(f"{path} is gone ({error.strerror})")
    if problems:
        raise ChangedInputError(
            f"while it was read, {', '.join(problems)}. Start again when nothing writes to the inputs."
        )


def fingerprint(path: Path, header_length: int) -> dict:
    """Size, modification time in ns and a cheap content hash of `path`, JSON-able.

    The hash is xxh3_128 over the size, the first `header_length` bytes (all names, dtypes, shapes), 64 evenly spaced
    blocks of 4 KiB and the last one. It sees another training run, another dtype, a renamed tensor; an edit of single
    weights only by luck, or by its mtime.
    """
    state = FileState.of(path)
    content = xxhash.xxh3_128(state.size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        content.update(file.read(header_length))
        last = max(state.size - BLOCK, 0)
        for i in range(BLOCKS + 1):
            content.update(os.pread(file.fileno(), BLOCK, last * i // BLOCKS))
    return {"size": state.size, "mtime_ns": state.mtime_ns, "xxh3_128": content.hexdigest()}


def side_files(directory: Path) -> list[Path]:
    """Configuration, tokenizer and chat template in `directory` itself, sorted by name."""
    found = {path for pattern in SIDE_FILES for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(WEIGHTS))


def read_config(directory: Path) -> dict | None:
    """config.json parsed, None where there is none. Raises ValueError saying what is wrong with it."""
    path = directory / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json cannot be read: {str(error)[:200]}") from None
    if type(config) is not dict:
        raise ValueError("config.json is not a map")
    return config


def read_license(directory: Path) -> str | None:
    """The `license` of the model card README.md (its name where it is "other"), None where it says nothing."""
    try:
        with open(directory / "README.md", "rb") as file:
            text = file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return None
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in lines[1:]:
        return None
    import yaml

    try:
        card = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (yaml.YAMLError, RecursionError):
        return None
    if type(card) is not dict:
        return None
    found = card.get("license")
    if found == "other":
        found = card.get("license_name", found)
    return ", ".join(map(str, found)) if type(found) is list else found and str(found)
