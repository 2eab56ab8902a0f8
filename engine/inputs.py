"""The models of a session: opened whatever they are given as, and brought to where they are merged."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any

from freemerge.accelerator import Accelerator, Lane
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import CheckpointError, gathered
from freemerge.kernels.array import Array, is_tensor
from freemerge.recipe.names import named_experts

Model = Any  # a path or hub name, a state dict, or an nn.Module

BESIDE = 16  # bytes an element of the largest tensor: what a method of tensor scope may put beside its result


class Inputs:
    """Open models.

    Args:
        base: None for methods without one.
        experts: in order, or by name.
        allow_pickle: as for open_checkpoint.

    Attributes:
        base, experts: what was given, the experts by name.
        checkpoints: those of the models, the base, if there is one, first.

    Raises:
        CheckpointError: naming everything that is no model or cannot be read.
    """

    def __init__(
        self, base: Model | None, experts: Sequence[Model] | Mapping[str, Model], *, allow_pickle: bool = False
    ):
        self.base, self.experts = base, _named(experts)
        self._stack = ExitStack()
        self.checkpoints, errors = [], []
        for name, model in self._given():
            try:
                self.checkpoints.append(self._stack.enter_context(_open(name, model, self.base, allow_pickle)))
            except CheckpointError as error:
                errors.append(error)
        if errors:
            self._stack.close()
            raise CheckpointError(gathered(errors))

    def _given(self) -> list[tuple[str, Model]]:
        return [*([] if self.base is None else [("base", self.base)]), *self.experts.items()]

    @property
    def on_disk(self) -> bool:
        return all(is_path(model) for _, model in self._given())

    @property
    def in_torch(self) -> bool:
        """Whether who gave them thinks in torch's tensors: some are given, or only paths, and torch is imported."""
        in_memory = [model for _, model in self._given() if not is_path(model)]
        if not in_memory:
            return "torch" in sys.modules
        return any(not isinstance(model, Mapping) or any(map(is_torch, model.values())) for model in in_memory)

    def lie_on(self, device) -> bool:
        """Whether one of the models lies on this torch device."""
        return any(_lies_on(checkpoint, device) for checkpoint in self.checkpoints)

    def fit(self, accelerator: Accelerator) -> bool:
        """Whether there is memory for the models, a result, and what a method needs beside them."""
        sizes = [sum(info.nbytes for info in checkpoint.tensors.values()) for checkpoint in self.checkpoints]
        there = [_lies_on(checkpoint, accelerator.device) for checkpoint in self.checkpoints]
        copied = sum(nbytes for nbytes, lies in zip(sizes, there, strict=True) if not lies)
        numels = (info.numel for checkpoint in self.checkpoints for info in checkpoint.tensors.values())
        return accelerator.fits(copied + sum(sizes[:1]) + BESIDE * max(numels, default=0))

    def move_to(self, accelerator: Accelerator) -> None:
        """Copy the models to the accelerator, by several lanes at once; those that lie there already stay."""
        lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(accelerator.lanes):
            lanes.put(accelerator.lane())

        def upload(array: Array) -> Array:
            lane = lanes.get()
            try:
                with lane.current():
                    return lane.upload(array)
            finally:
                lanes.put(lane)

        with ThreadPoolExecutor(accelerator.lanes) as pool:
            self._move(lambda checkpoint: _lies_on(checkpoint, accelerator.device), partial(pool.map, upload))

    def move_to_host(self) -> None:
        """Have files read into the system's cache, and copy what lies on a GPU."""
        for checkpoint in self.checkpoints:
            for name in checkpoint.tensors:
                checkpoint.prefetch(name)
        self._move(_lies_on_host, partial(map, _on_host))

    def shared(self) -> Iterable[Array]:
        """The arrays that are merged where they were given, and so must not be written to."""
        for checkpoint in self.checkpoints:
            if isinstance(checkpoint, MemoryCheckpoint):
                yield from map(checkpoint.read, checkpoint.tensors)

    def close(self) -> None:
        self._stack.close()
        self.checkpoints = []

    def _move(self, lies_there: Callable, move: Callable[[Iterable[Array]], Iterable[Array]]) -> None:
        self.checkpoints = [c if lies_there(c) else _Moved(c, move) for c in self.checkpoints]


class _Moved:
    """A checkpoint whose tensors were copied to where they are merged."""

    def __init__(self, checkpoint, move: Callable[[Iterable[Array]], Iterable[Array]]):
        self.label, self.config, self.tied = checkpoint.label, checkpoint.config, checkpoint.tied
        self.tensors = checkpoint.tensors
        names = [name for name in self.tensors if name not in self.tied]
        arrays = dict(zip(names, move(map(checkpoint.read, names)), strict=True))
        self.read = {name: arrays[self.tied.get(name, name)] for name in self.tensors}.__getitem__

    def read_run(self, name: str, begin: int, end: int) -> Array:
        """Elements [begin, end) of a tensor in order, [end - begin]."""
        return self.read(name).reshape(-1)[begin:end]

    def nbytes_made(self, name: str) -> int:
        """Bytes of memory that reading a tensor takes: none."""
        return 0


def is_path(model: Model) -> bool:
    return isinstance(model, (str, os.PathLike))


def _named(experts: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    if isinstance(experts, Mapping):
        return dict(experts)
    called = [os.fspath(model) if is_path(model) else f"expert{t}" for t, model in enumerate(experts)]
    return dict(zip(named_experts([(None, name) for name in called]), experts, strict=True))


def _open(name: str, model: Model, base: Model | None, allow_pickle: bool):
    if is_path(model):
        beneath = base if is_path(base) and base is not model else None
        return open_checkpoint(model, allow_pickle=allow_pickle, base=beneath)
    if not isinstance(model, Mapping) and not hasattr(model, "state_dict"):
        raise CheckpointError(f"{name}: a {type(model).__name__} is no path, no state dict and no nn.Module")
    return MemoryCheckpoint(model if isinstance(model, Mapping) else model.state_dict(), name)


def _lies_on(checkpoint, device) -> bool:
    arrays = map(checkpoint.read, checkpoint.tensors) if isinstance(checkpoint, MemoryCheckpoint) else [None]
    return all(is_torch(array) and array.device == device for array in arrays)


def _lies_on_host(checkpoint) -> bool:
    in_memory = isinstance(checkpoint, MemoryCheckpoint)
    return not in_memory or not any(is_tensor(checkpoint.read(name)) for name in checkpoint.tensors)


def _on_host(array: Array) -> Array:
    return from_torch(array.cpu()) if is_tensor(array) else array
