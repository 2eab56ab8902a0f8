"""A checkpoint that is a dict of arrays: the same attributes and methods as reader.Checkpoint, without files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.header import TensorInfo, shown
from freemerge.checkpoint.torch_arrays import from_torch, is_torch, to_torch
from freemerge.errors import CheckpointError, listed


class MemoryCheckpoint:
    """A state dict of NumPy arrays or CPU torch tensors, shared and not copied where they are contiguous.

    `tied` names what shares address, shape and dtype with an earlier entry of the dict. `path` and `config` are None.
    """

    def __init__(self, state_dict: Mapping[str, object], label: str):
        self.label, self.path, self.files, self.config = label, None, (), None
        self._given = dict(state_dict)
        self._arrays, problems = as_arrays(self._given)
        if problems:
            text = listed(
                (f"{label}: {problem}" for problem in problems),
                "Pass NumPy arrays or CPU torch tensors of real numbers.",
            )
            raise CheckpointError(text)
        self.tied = find_tied(self._given)
        self.tensors = {name: TensorInfo(array.dtype, array.shape, 0, None) for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only, contiguous array."""
        return self._arrays[name]

    def like_input(self, name: str, array: np.ndarray):
        """`array` as the kind that was given under `name`: itself, or a torch tensor that shares its memory."""
        return to_torch(array) if is_torch(self._given[name]) else array

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Nothing to do: it is in memory."""

    release = prefetch

    def fingerprint(self) -> dict:
        """Under the label: size in bytes, xxh3_128 over names, dtypes, shapes and both ends (4 KiB) of every tensor."""
        content = xxhash.xxh3_128()
        for name, array in self._arrays.items():
            content.update(f"{name} {array.dtype} {array.shape};".encode("utf-8", "surrogatepass"))
            data = array.reshape(-1).view(np.uint8)
            content.update(data[:4096].tobytes() + data[-4096:].tobytes())
        return {
            self.label: {"size": sum(info.nbytes for info in self.tensors.values()), "xxh3_128": content.hexdigest()}
        }

    def check_unchanged(self) -> None:
        """Nothing to do: whoever passes a dict keeps its arrays still."""

    def side_files(self) -> list[Path]:
        return []

    def license(self) -> str | None:
        return None

    def close(self) -> None:
        self._arrays, self._given = {}, {}

    def __enter__(self) -> "MemoryCheckpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def as_arrays(state_dict: Mapping[str, object]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read-only arrays sorted by name, and what is wrong with those values that cannot be one."""
    arrays, problems = {}, []
    for name, value in sorted(state_dict.items(), key=lambda item: str(item[0])):
        try:
            arrays[name] = _readonly(as_array(value))
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
    return arrays, problems


def as_array(value: object) -> np.ndarray:
    """A NumPy array or CPU torch tensor as a contiguous array of a dtype freemerge stores. Raises ValueError."""
    if not isinstance(value, np.ndarray) and not is_torch(value):
        raise ValueError(f"a {type(value).__name__}, neither a NumPy array nor a torch tensor")
    array = from_torch(value) if is_torch(value) else np.asarray(value)
    if array.dtype not in NAMES:
        raise ValueError(f"dtype {array.dtype}, which freemerge does not read")
    return array if array.flags.c_contiguous else array.copy(order="C")


def find_tied(state_dict: Mapping[str, object]) -> dict[str, str]:
    """Name to the first name with the same memory: same address, shape, strides and dtype."""
    first: dict[tuple, str] = {}
    tied = {}
    for name, value in state_dict.items():
        key = _memory(value)
        if key is not None and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _memory(value) -> tuple | None:
    if is_torch(value):
        return (value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)) if value.numel() else None
    return (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str) if value.size else None


def _readonly(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
