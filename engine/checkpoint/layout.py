"""Where every byte of an output goes, known before the first one is written: shards, their headers, the index.

A shard equals, byte for byte, what the safetensors library writes for the same tensors: wider dtypes first, then by
name, the header padded with spaces to a multiple of 8.
Source: github.com/huggingface/safetensors, README.md and src/tensor.rs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from freemerge.checkpoint.dtypes import NAMES

# safetensors' own list of dtypes (NAMES); its writer goes through it from the end.
_ORDER = [
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16"),
    *("BF16", "I32", "U32", "F32", "F64", "I64", "U64"),
]


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PlacedEntry(Entry):
    """A tensor with its place: `offset` is in bytes from the start of the file."""

    offset: int


@dataclass(frozen=True)
class ShardPlan:
    """One file: its header as it stands on disk (length word included) and its tensors in order of offset."""

    filename: str
    header: bytes
    entries: tuple[PlacedEntry, ...]

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def plan_shards(entries: Sequence[Entry], shard_size: int, filename: str | None = None) -> list[ShardPlan]:
    """Split `entries`, in their order, into shards of at most `shard_size` bytes of tensors.

    With `filename` all are in one file of that name: a result that is no model.

    A tensor larger than that gets a shard of its own. One shard is named model.safetensors, several
    model-00001-of-0000N.safetensors.
    """
    if filename is not None:
        return [plan_shard(filename, entries)]
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    if len(groups) == 1:
        return [plan_shard("model.safetensors", entries)]
    names = (f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    return [plan_shard(name, group) for name, group in zip(names, groups, strict=True)]


def plan_shard(
    filename: str, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None, header_room: int = 0
) -> ShardPlan:
    """Place `entries` in one file; the header is padded to `header_room` bytes where it is shorter.

    `metadata` is {"format": "pt"} unless given, what transformers asks for.
    """
    ordered = sorted(entries, key=lambda entry: (-_ORDER.index(NAMES[np.dtype(entry.dtype)]), entry.name))
    header = encode_header(ordered, {"format": "pt"} if metadata is None else metadata, header_room)
    placed, offset = [], len(header)
    for entry in ordered:
        placed.append(PlacedEntry(entry.name, np.dtype(entry.dtype), tuple(entry.shape), offset))
        offset += entry.nbytes
    return ShardPlan(filename, header, tuple(placed))


def encode_header(ordered: Iterable[Entry], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The head of a file whose tensors lie in the order given, at least `room` bytes long."""
    head: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        end = offset + entry.nbytes
        head[entry.name] = {
            "dtype": NAMES[np.dtype(entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(8 + len(text) + -len(text) % 8, room + -room % 8)
    return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)


def index_json(shards: Sequence[ShardPlan]) -> bytes:
    """model.safetensors.index.json, as transformers writes it."""
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    weight_map = {entry.name: shard.filename for shard in shards for entry in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
