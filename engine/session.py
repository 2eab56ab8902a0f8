"""Merge the same models again and again, with other parameters: for sweeps and searches."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from freemerge import api, devices, methods, resident
from freemerge.api import MergedStateDict, Result
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.torch_arrays import from_torch, is_torch, to_torch
from freemerge.errors import CheckpointError, FreemergeError, RecipeError, gathered, listed
from freemerge.experts.extract import Extraction
from freemerge.experts.memory import MemoryExpert
from freemerge.kernels import dispatch
from freemerge.kernels.array import Array, is_float, is_tensor
from freemerge.module_sink import Memory, ModuleSink, Targets
from freemerge.plan import Plan, Planner
from freemerge.recipe import Recipe, named_experts
from freemerge.sinks import MemorySink
from freemerge.sizes import parse_size
from freemerge.stream import Stream

Model = Any  # a path or hub name, a state dict, or an nn.Module

BESIDE = 16  # bytes an element of the largest tensor: what a method of tensor scope may put beside its result
SPOILT = "`into` holds a result that is not finite; merge into it again"


class Session:
    """Models that stay where they are merged, and merges of them: coefficients in, milliseconds out.

        with freemerge.Session("llama", {"math": "runs/math", "code": "runs/code"}) as session:
            for scaling in (0.2, 0.3, 0.4):
                session.merge("fr", scaling=scaling, into=model)

    On the CPU models are used where they lie: mapped files in the system's cache, the memory of arrays and tensors
    that were given, which have to stay as they are. For a GPU, the first that `device` means, they are copied there
    once; where they and a result do not fit, every merge streams them through all the GPUs `device` means.

    Threads may share a session: a merge waits for the one before.

    Args:
        base: a directory, file or hub name; a state dict of NumPy arrays or torch tensors; an nn.Module; None for
            methods without a base.
        experts: models like `base`, in order, or by name.
        device: "auto" (the GPU that tensors given lie on, else the first GPU, or the CPU where there is none), "cpu",
            "cuda" or "cuda:N".
        threads, max_memory, max_gpu_memory, allow_pickle: as for `freemerge.merge`.

    Raises:
        InputError: models cannot be read, or the device cannot be used.
    """

    def __init__(
        self,
        base: Model | None,
        experts: Sequence[Model] | Mapping[str, Model],
        *,
        device: str = "auto",
        threads: int = 0,
        max_memory: int | str = "2GiB",
        max_gpu_memory: int | str | None = None,
        allow_pickle: bool = False,
    ):
        self._base, self._experts = base, _named(experts)
        self._options = {
            "device": device,
            "threads": threads,
            "max_memory": max_memory,
            "max_gpu_memory": max_gpu_memory,
            "allow_pickle": allow_pickle,
        }
        self._lock, self._stack = threading.Lock(), ExitStack()
        accelerators = devices.find(device, None if max_gpu_memory is None else parse_size(max_gpu_memory))
        given = [("base", base), *self._experts.items()] if base is not None else list(self._experts.items())
        models = _opened(given, allow_pickle, self._stack)
        self._torch = bool(accelerators) or _wants_torch(model for _, model in given)
        self._accelerators = _chosen(accelerators, models, device)
        self._resident = not self._accelerators or _fits(self._accelerators[0], models)
        if self._resident:
            models = self._moved(models)
        first = models[0] if models else MemoryCheckpoint({}, "base")
        self._planner: Planner | None = Planner(first, models[1:] if base is not None else models)
        shared = [model for model in models if isinstance(model, MemoryCheckpoint)]
        self._inputs = Memory(model.read(name) for model in shared for name in model.tensors)

    def merge(
        self,
        method: str,
        *,
        into: Any = None,
        out: str | os.PathLike | None = None,
        dtype: str | None = None,
        check_finite: bool = True,
        **parameters: Any,
    ) -> Any:
        """Merge the session's models once.

        Args:
            method: name of a method.
            into: what to write the result into, in place: an nn.Module, or a state dict, such as the result of a merge
                before; a state dict costs less time than a module of many layers. It has a tensor for each of the
                result, by its name, on any device; each is rounded once to its own dtype. Tied tensors are written
                once, gradients and `requires_grad` stay as they are.
            out: a directory to write a checkpoint to, as `freemerge.merge` does; for models on disk only.
            dtype: of the result's floating tensors; that of the base, tensor by tensor, if not given. Not with `into`.
            check_finite: refuse a result with NaN or Inf in it. With `into` it is written by then: the error names the
                tensors, and the next merge into them mends them.
            parameters: of the method, as for `freemerge.merge`; numbers for the experts also as a list.

        Returns:
            `into`; or a MergedStateDict of new tensors on the session's device, on the CPU where merges are streamed.
            They are torch tensors where the device is a GPU, where torch tensors were given, and where only paths were
            and torch is imported; else NumPy arrays. Its `.experts` are those of a method that writes experts; `into`
            takes the backbone alone. With `out` a Result.

        Raises:
            InputError: the recipe is not in order, models do not fit together or `into` does not fit them; all problems
                at once, nothing is written. Or the result is not finite.
        """
        with self._lock:
            if self._planner is None:
                raise FreemergeError("this session is closed; open another one")
            if out is not None:
                return self._merge_to_disk(method, into, out, dtype, check_finite, parameters)
            if into is not None and dtype is not None:
                raise RecipeError("dtype: with `into` each tensor has its own already; leave it out")
            dispatch.set_threads(self._options["threads"])
            targets = None if into is None else Targets(into)
            plan = self._plan(method, targets, dtype, parameters)
            if targets is None:
                return self._merge_into_new(plan, check_finite)
            self._merge_into(plan, targets, check_finite)
            return into

    def close(self) -> None:
        """Let go of the models, and of a GPU's memory."""
        with self._lock:
            self._planner = None
            self._stack.close()
            for accelerator in self._accelerators:
                accelerator.empty_cache()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- one merge --------------------------------------------------------------------------------------------------

    def _plan(self, method: str, targets: Targets | None, dtype: str | None, parameters: dict[str, Any]) -> Plan:
        models = {name: f"experts/{name}" for name in self._experts}  # unlike "base", whatever the name is
        base = None if self._base is None else "base"
        recipe = Recipe.from_flags(method, base, models, parameters, dtype=dtype)
        dtypes = {} if targets is None else {name: d for name, d in targets.dtypes.items() if is_float(d)}
        return self._planner.plan(recipe, methods.get(recipe.method), dtypes=dtypes)

    def _merge_into_new(self, plan: Plan, check_finite: bool) -> MergedStateDict:
        sink = MemorySink(plan)
        cut_out = {name: MemoryExpert(name) for name in self._experts} if plan.method.writes_experts else {}
        self._run(plan, sink, check_finite, Extraction(plan, sink, lambda name, _: cut_out[name]) if cut_out else None)
        kinds = {id(array): self._as_result(array) for array in sink.tensors.values()}
        merged = MergedStateDict((name, kinds[id(sink.tensors[name])]) for name in plan.base.tensors)
        merged.experts = tuple(cut_out.values())
        return merged

    def _merge_into(self, plan: Plan, targets: Targets, check_finite: bool) -> None:
        sink = ModuleSink(plan, targets, self._inputs, self._device)
        try:
            with _said_of_into():
                self._run(plan, sink, check_finite, None)
        finally:
            sink.tell_autograd()

    def _run(self, plan: Plan, sink, check_finite: bool, extraction: Extraction | None) -> None:
        if self._resident:
            resident.run(plan, sink, extraction=extraction, check_finite=check_finite)
        else:
            Stream(
                plan,
                sink,
                extraction=extraction,
                max_memory=1 << 62,
                check_finite=check_finite,
                accelerators=self._accelerators,
            ).run()

    def _merge_to_disk(self, method: str, into, out, dtype, check_finite: bool, parameters: dict[str, Any]) -> Result:
        if into is not None:
            raise RecipeError("into and out: the result goes to one of them")
        if not all(_is_path(model) for model in (self._base or "", *self._experts.values())):
            raise RecipeError("out: some models of this session are in memory; save them, and open it with their paths")
        return api.merge(
            method,
            self._base,
            self._experts,
            out,
            dtype=dtype,
            check_finite=check_finite,
            **self._options,
            **parameters,
        )

    # -- where things are -------------------------------------------------------------------------------------------

    @property
    def _device(self):
        """The torch device whose tensors the ops get; None where they get NumPy arrays."""
        return self._accelerators[0].device if self._accelerators and self._resident else None

    def _moved(self, models: list) -> list:
        """The models, as the ops get them; those that are not there yet are copied."""
        if self._device is None:
            for model in models:
                for name in model.tensors:
                    model.prefetch(name)
            return [_Moved(model, _to_host) if _lies_on_gpu(model) else model for model in models]
        lane = self._accelerators[0].lane()
        with lane.current():
            return [model if _lies_on(model, self._device) else _Moved(model, lane.upload) for model in models]

    def _as_result(self, array: Array) -> Array:
        return to_torch(array) if self._torch and not is_tensor(array) else array


class _Moved:
    """A checkpoint whose tensors were copied to where they are merged."""

    def __init__(self, checkpoint, move):
        self.label, self.config, self.tied, self.tensors = (
            checkpoint.label,
            checkpoint.config,
            checkpoint.tied,
            checkpoint.tensors,
        )
        arrays = {name: move(checkpoint.read(name)) for name in self.tensors if name not in self.tied}
        self.read = {name: arrays[self.tied.get(name, name)] for name in self.tensors}.__getitem__


@contextmanager
def _said_of_into() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        text = error.args[0]
        raise CheckpointError(listed(text.listed, text.remedy, SPOILT)) from None


def _named(experts: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    if isinstance(experts, Mapping):
        return dict(experts)
    called = [os.fspath(model) if _is_path(model) else f"expert{t}" for t, model in enumerate(experts)]
    return dict(zip(named_experts([(None, name) for name in called]), experts, strict=True))


def _is_path(model: Model) -> bool:
    return isinstance(model, (str, os.PathLike))


def _opened(given: list[tuple[str, Model]], allow_pickle: bool, stack: ExitStack) -> list:
    opened, errors = [], []
    for name, model in given:
        try:
            opened.append(stack.enter_context(_open(name, model, allow_pickle)))
        except CheckpointError as error:
            errors.append(error)
    if errors:
        stack.close()
        raise CheckpointError(gathered(errors))
    return opened


def _open(name: str, model: Model, allow_pickle: bool):
    if _is_path(model):
        return open_checkpoint(model, allow_pickle=allow_pickle)
    if not isinstance(model, Mapping) and not hasattr(model, "state_dict"):
        raise CheckpointError(f"{name}: a {type(model).__name__} is no path, no state dict and no nn.Module")
    return MemoryCheckpoint(model if isinstance(model, Mapping) else model.state_dict(), name)


def _wants_torch(models: Iterator[Model]) -> bool:
    in_memory = [model for model in models if not _is_path(model)]
    if not in_memory:
        return "torch" in sys.modules
    return any(not isinstance(model, Mapping) or any(map(is_torch, model.values())) for model in in_memory)


def _chosen(accelerators: list[devices.Accelerator], models: list, device: str) -> list[devices.Accelerator]:
    """The accelerators, one that models lie on first where the session may choose."""
    if device != "auto":
        return accelerators
    return sorted(accelerators, key=lambda accelerator: not any(_lies_on(m, accelerator.device) for m in models))


def _fits(accelerator: devices.Accelerator, models: list) -> bool:
    """Whether the models, a result and what a method needs beside them fit."""
    sizes = [[info.nbytes for info in model.tensors.values()] for model in models]
    there = [_lies_on(model, accelerator.device) for model in models]
    copied = sum(sum(nbytes) for nbytes, lies in zip(sizes, there, strict=True) if not lies)
    largest = max((info.numel for model in models for info in model.tensors.values()), default=0)
    return accelerator.fits(copied + sum(sizes[0] if sizes else []) + BESIDE * largest)


def _lies_on(model, device) -> bool:
    arrays = map(model.read, model.tensors) if isinstance(model, MemoryCheckpoint) else [None]
    return all(array is not None and is_tensor(array) and array.device == device for array in arrays)


def _lies_on_gpu(model) -> bool:
    return isinstance(model, MemoryCheckpoint) and any(is_tensor(model.read(name)) for name in model.tensors)


def _to_host(array: Array) -> Array:
    return from_torch(array.cpu()) if is_tensor(array) else array
