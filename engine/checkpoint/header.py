"""The head of a safetensors file: 8 bytes of length, that much JSON, then the tensors without a gap. Strictly checked.

What the format's own reader refuses is refused here, and more: names given twice, entries with unknown keys, sizes no
array can have.  Source: github.com/huggingface/safetensors, README.md and safetensors/src/tensor.rs.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freemerge.checkpoint.dtypes import DTYPES, UNREAD
from freemerge.errors import CheckpointError, listed

MAX_LENGTH = 100_000_000  # bytes of JSON; the format's own reader has the same limit
MAX_DIMENSIONS = 32  # what every supported NumPy can hold
MAX_SHOWN = 20  # problems of one file that an error spells out
REMEDY = "Download or write the file again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor; `offset` counts bytes from the start of `file`.

    Without a mapped file there is none: `offset` is 0 in pickled checkpoints, `file` is None in memory.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    file: Path | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """`length` is where the data starts: 8 plus the bytes of JSON. Tensors keep the order of the JSON."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    length: int


class Malformed(Exception):
    """Problems of one file, each a phrase that goes after the file's name."""

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of the safetensors file `path`; the tensors themselves are not touched.

    Raises:
        CheckpointError: naming all that is wrong with the file.
    """
    try:
        return examine_header(Path(path))
    except Malformed as error:
        raise CheckpointError(listed((f"{path}: {problem}" for problem in error.problems), REMEDY)) from None


def examine_header(path: Path) -> Header:
    """`read_header` for callers that collect the problems of several files: raises Malformed."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Malformed("not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = _length(start, size)
            text = file.read(length)
    except OSError as error:
        raise Malformed(f"cannot be read: {error.strerror or error}") from None
    if len(text) != length:
        raise Malformed("became shorter while it was read")
    return parse_header(text, size - 8 - length, path)


def _length(start: bytes, size: int) -> int:
    if len(start) < 8:
        raise Malformed(f"{size} bytes, too short for a safetensors file")
    if start == b"version ":
        raise Malformed("a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    length = int.from_bytes(start, "little")
    if length > MAX_LENGTH:
        raise Malformed(f"not a safetensors file: its header would be {length} bytes, {MAX_LENGTH} are allowed")
    if 8 + length > size:
        raise Malformed(f"cut short: {size} bytes, the header alone is {8 + length}")
    return length


def parse_header(text: bytes, data_size: int, path: Path) -> Header:
    """Check the JSON `text` of the header of `path`, which `data_size` bytes of tensors follow. Raises Malformed."""
    entries = parse_json(text)
    metadata = _metadata(entries.pop("__metadata__", {}))
    data_start = 8 + len(text)
    tensors, extents, problems = {}, [], []
    for name, entry in entries.items():
        try:
            _check_name(name)
            dtype, shape, begin, end = _tensor(entry)
        except Malformed as error:
            problems += (f"{shown(name)}: {problem}" for problem in error.problems)
            continue
        tensors[name] = TensorInfo(dtype, shape, data_start + begin, path)
        extents.append((begin, end, name))
    # Where entries are wrong, the holes they seem to leave would say nothing new.
    problems = problems or _gaps(extents, data_size)
    if problems:
        raise Malformed(*few(problems))
    return Header(tensors, metadata, data_start)


def parse_json(text: bytes) -> dict:
    """A JSON object as dict. Duplicate keys, numbers that are no sizes, bad UTF-8, deep nesting raise Malformed."""
    if text[:1] != b"{":
        raise Malformed("not a safetensors file: its header does not start with '{'")
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_size,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise Malformed(f"header is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"header is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise Malformed("header is nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]
        raise Malformed(*few([f"header names {shown(key)} twice" for key in dict.fromkeys(twice)]))
    return unique


def _size(digits: str) -> int:
    # Before int() sees them: millions of digits take it quadratic time. The format's own reader refuses "-0" too.
    if digits[0] == "-" or len(digits) > 19:
        _no_number(digits)
    return int(digits)


def _no_number(text: str) -> None:
    raise Malformed(f"header has {shown(text)} where only sizes and offsets may be")


def _metadata(metadata: object) -> dict[str, str]:
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise Malformed("__metadata__ is not a map of strings to strings")
    if any(_has_surrogate(text) for pair in metadata.items() for text in pair):
        raise Malformed("__metadata__ has half a character (a lone surrogate)")
    return metadata


def _check_name(name: str) -> None:
    if not name:
        raise Malformed("a tensor without a name")
    if "\0" in name or _has_surrogate(name):
        raise Malformed("a tensor's name with a NUL or half a character in it")


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _tensor(entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed("its entry is not {dtype, shape, data_offsets}")
    dtype, shape = _dtype(entry["dtype"]), _shape(entry["shape"])
    begin, end = _offsets(entry["data_offsets"])
    # Zeros count as ones: the other dimensions of an empty tensor must not overflow either.
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise Malformed(f"shape {list(shape)} is larger than any memory")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise Malformed(
            f"{entry['dtype']} {list(shape)} takes {needed} bytes, its offsets [{begin}, {end}] hold {end - begin}"
        )
    return dtype, shape, begin, end


def _dtype(name: object) -> np.dtype:
    if type(name) is str and name in DTYPES:
        return DTYPES[name]
    if name in UNREAD:
        raise Malformed(f"stored as {name}, which freemerge does not read; convert it to BF16 or F32")
    raise Malformed(f"no dtype is called {shown(name)}")


def _shape(shape: object) -> tuple[int, ...]:
    if type(shape) is not list or any(type(size) is not int for size in shape):
        raise Malformed("its shape is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise Malformed(f"{len(shape)} dimensions, {MAX_DIMENSIONS} are allowed")
    return tuple(shape)


def _offsets(offsets: object) -> tuple[int, int]:
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise Malformed("its data_offsets are not [begin, end]")
    begin, end = offsets
    if begin > end:
        raise Malformed(f"its data_offsets [{begin}, {end}] run backwards")
    return begin, end


def _gaps(extents: list[tuple[int, int, str]], data_size: int) -> list[str]:
    problems, position = [], 0
    for begin, end, name in sorted(extents):
        if begin > position:
            problems.append(f"{shown(name)}: {begin - position} bytes before it belong to no tensor")
        elif begin < position:
            problems.append(f"{shown(name)}: starts {position - begin} bytes inside the tensor before it")
        position = max(position, end)
    if position > data_size:
        problems.append(f"cut short: {position - data_size} bytes of tensors are missing at its end")
    elif position < data_size:
        problems.append(f"{data_size - position} bytes at its end belong to no tensor")
    return problems


def few(problems: list[str]) -> list[str]:
    """The first problems of a file; one bad file must not hide those of the others."""
    return problems if len(problems) <= MAX_SHOWN else [*problems[:MAX_SHOWN], f"and {len(problems) - MAX_SHOWN} more"]


def shown(value: object) -> str:
    """A value from a file, fit to be printed."""
    if type(value) in (list, dict):
        return f"a {type(value).__name__}"
    text = value if type(value) is str and value.isprintable() and value else ascii(value)
    return text if len(text) <= 200 else text[:200] + "..."
