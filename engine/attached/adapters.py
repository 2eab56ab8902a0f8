"""LoRA adapters as experts of a running model: what PEFT has saved, as parts of the model's own tensors.

An adapter knows no fingerprint of a backbone. What is checked is that every module it changes is there, in the shape
that A and B have.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.checkpoint.adapter import CONFIG
from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.header import TensorInfo
from freemerge.checkpoint.low_rank import Change
from freemerge.checkpoint.memory import find_tied
from freemerge.checkpoint.reader import open_adapter
from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import CheckpointError, listed
from freemerge.experts.memory import MemoryExpert
from freemerge.kernels.array import Array, dtype_of
from freemerge.parts import Difference, LowRank, Part

FLOAT32 = np.dtype(np.float32)
REMEDY = (
    "Attach an adapter to the model it was trained on. What does not add up can be merged into that: "
    "freemerge merge passthrough MODEL+ADAPTER."
)


class AdapterExpert(MemoryExpert):
    """An adapter as an expert; its tensors have the model's own names.

    B A is a low-rank part with the scaling as its scale; biases, layers saved whole (`modules_to_save`), which become
    differences to the model's, and convolutions are differences.

    Args:
        folder: as PEFT saves it.
        model: the module it goes on, with the weights it has now.

    Raises:
        CheckpointError: all that does not fit: other modules or shapes, DoRA, NaN.
    """

    def __init__(self, name: str, folder: Path, model: Any):
        super().__init__(name)
        base, found = ModelTensors(model), {}
        with open_adapter(folder) as adapter:
            changes = adapter.changes(base)
            problems = list(_problems(changes, base))
            if not problems:
                found = {tensor: _part(change, base, tensor) for tensor, change in changes.items()}
            problems += [
                f"NaN or Inf in what it makes of {tensor}" for tensor, (part, _) in found.items() if _bad(part)
            ]
        if problems:
            problems = (f"{adapter.label}: {problem}" for problem in problems)
            raise CheckpointError(listed(problems, REMEDY, outcome="nothing was changed"))
        self.tensors = {tensor: part for tensor, (part, _) in found.items() if part is not None}
        self.finish({"mode": "add", "method": "lora"}, {tensor: scale for tensor, (_, scale) in found.items()})


class ModelTensors:
    """A running model as Adapter.changes wants a base: the attributes of a reader.Checkpoint that it asks for."""

    def __init__(self, model: Any):
        self._tensors = {n: t for n, t in model.state_dict().items() if is_torch(t) and _dtype(t) in NAMES}
        ties = find_tied({name: tensor for name, tensor in self._tensors.items() if not tensor.is_meta})
        self.label, self.tied = "the model", {}
        self.aliases = {name: [alias for alias, first in ties.items() if first == name] for name in ties.values()}
        # as in a file: of tensors that are one, one
        self.tensors = {
            name: TensorInfo(_dtype(tensor), tuple(tensor.shape), 0, None)
            for name, tensor in self._tensors.items()
            if name not in ties
        }
        config = getattr(model, "config", None)
        self.config = config.to_dict() if hasattr(config, "to_dict") else None
        if self.config is not None and not self.config.get("architectures"):
            self.config["architectures"] = [type(model).__name__]

    def read(self, name: str) -> np.ndarray:
        return from_torch(self._tensors[name].cpu())


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (path / CONFIG).is_file()


def _dtype(tensor: Any) -> np.dtype | None:
    try:
        return dtype_of(tensor)
    except TypeError:  # one that NumPy has no name for
        return None


def _problems(changes: Mapping[str, Change], base: ModelTensors) -> Iterator[str]:
    if any(update.magnitude is not None for change in changes.values() for update in change.updates):
        yield "a DoRA adapter: it rescales whole weights, which does not add up with others"
    for name in changes:
        # with a configuration, Adapter.changes has found out whether they were trained as one
        if base.config is None and name in base.aliases:
            yield f"{name}: it is {', '.join(base.aliases[name])} too, which PEFT leaves as it is"


def _part(change: Change, base: ModelTensors, name: str) -> tuple[Part | None, float]:
    """What becomes of a tensor, as one part and its scale; no part where it stays as it is."""
    shape, updates = base.tensors[name].shape, change.updates
    instead = None if change.read is None else _difference(change.read(), base.read(name))
    if instead is None and len(updates) == 1 and len(shape) == 2 and updates[0].a is not None:
        # copies, as whoever trains an adapter may write over its file
        left, right = (np.array(side, np.float32, order="C") for side in updates[0].factors(FLOAT32))
        return LowRank(left, right, shape), updates[0].scaling
    if instead is None and not updates:
        return None, 1.0
    total = np.zeros(shape, np.float32) if instead is None else instead
    for update in updates:
        left, right = update.factors(FLOAT32)
        total += np.float32(update.scaling) * (left @ right).reshape(shape)
    return Difference(total, shape), 1.0


def _bad(part: Part | None) -> bool:
    return part is not None and not all(np.isfinite(array).all() for array in part.arrays.values())


def _difference(array: Array, base: Array) -> np.ndarray | None:
    """float32; None where there is none, as PEFT saves embeddings and biases that were not trained, too."""
    found = array.astype(np.float32) - base.astype(np.float32)
    return found if found.any() else None
