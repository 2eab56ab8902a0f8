"""Pickled checkpoints, read by torch's weights_only loader: it builds tensors and refuses everything else."""

import pickle
from pathlib import Path

import numpy as np

from freemerge.checkpoint.header import TensorInfo, shown
from freemerge.checkpoint.memory import as_arrays, find_tied
from freemerge.checkpoint.reader import Checkpoint
from freemerge.checkpoint.source import Source
from freemerge.checkpoint.torch_arrays import is_torch
from freemerge.errors import UnavailableError

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
HEADER = 1 << 16  # bytes at a file's start that its fingerprint takes whole


class PickledCheckpoint(Checkpoint):
    """The same attributes and methods. A TensorInfo's offset is 0: where a pickle keeps a tensor is torch's affair."""

    def _open(self, source: Source, problems: list[str]) -> dict[str, TensorInfo]:
        tensors, homes = {}, {}
        for file in self.files:
            try:
                loaded = _load(file)
            except ValueError as error:
                problems.append(f"{self._name(file)}: {error}")
                continue
            tensors |= loaded
            homes |= dict.fromkeys(loaded, file)
        if source.weight_map is not None and not problems:
            problems += self._missing(source.weight_map, tensors)
        self._arrays, unfit = as_arrays(tensors)
        problems += unfit
        self.tied = find_tied(tensors)
        return {name: TensorInfo(array.dtype, array.shape, 0, homes[name]) for name, array in self._arrays.items()}

    def _missing(self, weight_map: dict[str, str], tensors: dict) -> list[str]:
        gone = [
            f"{shown(name)} is in {weight_map[name]} by the index, but not there"
            for name in weight_map.keys() - tensors.keys()
        ]
        return sorted(gone + [f"{shown(name)} is not in the index" for name in tensors.keys() - weight_map.keys()])

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def _advise(self, advice, name: str, begin: int, end: int | None) -> None:
        # Old files are not mapped but loaded, and memory that is not a file's must not be advised away.
        pass

    def _header_length(self, file: Path) -> int:
        return HEADER

    def close(self) -> None:
        self._arrays = {}


def _load(file: Path) -> dict:
    try:
        import torch
    except ImportError:
        raise UnavailableError(f"{file} is pickled, and only torch reads that; pip install torch") from None
    options = {"weights_only": True, "map_location": "cpu"}
    try:
        mapped = _is_zip(file)  # the format since torch 1.6; older files cannot be mapped
        return _state_dict(torch.load(file, mmap=mapped, **options))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"torch's weights_only loader refuses it: {reason[0][:300]}") from None


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _state_dict(loaded: object) -> dict:
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a dict of tensors")
    inner = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)]
    if len(inner) > 1:
        raise ValueError(
            f"holds several state dicts ({', '.join(key for key in WRAPPERS if key in loaded)}); save the one you mean"
        )
    if inner:
        return _state_dict(inner[0])
    other = [shown(key) for key, value in loaded.items() if not (isinstance(key, str) and is_torch(value))]
    if other:
        raise ValueError(f"holds more than tensors: {', '.join(other[:6])}")
    return loaded
