"""A checkpoint that is a dict of arrays: the same attributes and methods as reader.Checkpoint, without files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.header import TensorInfo, shown
from freemerge.checkpoint.torch_arrays import dense, flat_bytes, from_torch, is_torch, to_torch
from freemerge.errors import CheckpointError, listed
from freemerge.kernels.array import Array, dtype_of, is_tensor


class MemoryCheckpoint:
    """A state dict of NumPy arrays or torch tensors, shared and not copied where they are contiguous.

    Tensors on a CUDA GPU stay tensors there; CPU tensors are read as NumPy arrays that share their memory.
    `tied` names what shares address, shape and dtype with an earlier entry of the dict. `path` and `config` are None.

    Args:
        device: a torch device whose tensors stay tensors too: the CPU's, for GPU versions in Triton's interpreter.
    """

    def __init__(self, state_dict: Mapping[str, object], label: str, *, device=None):
        self.label, self.path, self.files, self.config = label, None, (), None
        self._given = dict(state_dict)
        self._arrays, problems = as_arrays(self._given, device)
        if problems:
            text = listed(
                (f"{label}: {problem}" for problem in problems),
                "Pass NumPy arrays or torch tensors, on the CPU or a CUDA GPU, of real numbers.",
            )
            raise CheckpointError(text)
        self.tied = find_tied(self._given)
        self.tensors = {
            name: TensorInfo(dtype_of(array), tuple(array.shape), 0, None) for name, array in self._arrays.items()
        }

    def read(self, name: str) -> Array:
        """The tensor as a read-only, contiguous array, or a contiguous tensor on its GPU."""
        return self._arrays[name]

    def read_run(self, name: str, begin: int, end: int) -> Array:
        """Elements [begin, end) of a tensor in order, [end - begin]."""
        return self.read(name).reshape(-1)[begin:end]

    def nbytes_made(self, name: str) -> int:
        """Bytes of memory that reading a tensor takes: none."""
        return 0

    def like_input(self, name: str, array: Array):
        """`array` as the kind that was given under `name`: itself, or a torch tensor that shares its memory."""
        return to_torch(array) if is_torch(self._given[name]) and not is_tensor(array) else array

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Nothing to do: it is in memory."""

    release = prefetch

    def fingerprint(self) -> dict:
        """Under the label: size in bytes, xxh3_128 over names, dtypes, shapes and both ends (4 KiB) of every tensor."""
        content = xxhash.xxh3_128()
        for name, array in self._arrays.items():
            info = self.tensors[name]
            content.update(f"{name} {info.dtype} {info.shape};".encode("utf-8", "surrogatepass"))
            data = flat_bytes(array)
            for end in (data[:4096], data[-4096:]):
                content.update((end.cpu().numpy() if is_tensor(end) else end).tobytes())
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


def as_arrays(state_dict: Mapping[str, object], device=None) -> tuple[dict[str, Array], list[str]]:
    """Read-only arrays sorted by name (tensors, on a CUDA GPU or `device`), and what is wrong with other values."""
    arrays, problems = {}, []
    for name, value in sorted(state_dict.items(), key=lambda item: str(item[0])):
        try:
            arrays[name] = _readonly(as_array(value, device))
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
    return arrays, problems


def as_array(value: object, device=None) -> Array:
    """A contiguous array, or a tensor on a CUDA GPU or `device`, of a dtype freemerge stores. Raises ValueError."""
    if is_torch(value):
        stays = value.device.type == "cuda" or value.device == device
        array = dense(value) if stays else from_torch(value)
    elif isinstance(value, np.ndarray):
        array = np.asarray(value)
    else:
        raise ValueError(f"a {type(value).__name__}, neither a NumPy array nor a torch tensor")
    if not _is_stored(array):
        raise ValueError(f"dtype {array.dtype}, which freemerge does not read")
    return array if is_tensor(array) or array.flags.c_contiguous else array.copy(order="C")


def _is_stored(array: Array) -> bool:
    try:
        return dtype_of(array) in NAMES
    except TypeError:  # one that NumPy has no name for
        return False


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
        where = (str(value.device), value.data_ptr())
        return (*where, tuple(value.shape), value.stride(), str(value.dtype)) if value.numel() else None
    return (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str) if value.size else None


def _readonly(array: Array) -> Array:
    if is_tensor(array):
        return array
    view = array.view()
    view.flags.writeable = False
    return view
