"""Merge the same models again and again, with other parameters: for sweeps and searches."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from freemerge import api, devices, methods, resident
from freemerge.accelerator import is_out_of_memory
from freemerge.api import Result
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.torch_arrays import to_torch
from freemerge.errors import CheckpointError, FreemergeError, RecipeError, UnavailableError, listed
from freemerge.experts.extract import Extraction
from freemerge.experts.memory import ExpertsInMemory
from freemerge.inputs import Inputs, Model
from freemerge.kernels import dispatch
from freemerge.kernels.array import Array, is_float, is_tensor
from freemerge.module_sink import Memory, ModuleSink, Targets
from freemerge.plan import Plan, Planner
from freemerge.recipe import Recipe
from freemerge.sinks import MemorySink
from freemerge.sizes import parse_size
from freemerge.state_dicts import MergedStateDict
from freemerge.stream import Stream

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
        device: "auto" (the GPU that a model given lies on, else the first GPU, or the CPU where there is none), "cpu",
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
        self._options = {
            "device": device,
            "threads": threads,
            "max_memory": max_memory,
            "max_gpu_memory": max_gpu_memory,
            "allow_pickle": allow_pickle,
        }
        self._lock = threading.Lock()
        accelerators = devices.find(device, None if max_gpu_memory is None else parse_size(max_gpu_memory))
        self._inputs = inputs = Inputs(base, experts, allow_pickle=allow_pickle)
        if device == "auto":
            accelerators.sort(key=lambda accelerator: not inputs.lie_on(accelerator.device))
        self._torch = bool(accelerators) or inputs.in_torch
        self._accelerators = accelerators
        self._resident = self._settle()
        self._shared = Memory(inputs.shared())
        first = inputs.checkpoints[0] if inputs.checkpoints else MemoryCheckpoint({}, "base")
        self._planner: Planner | None = Planner(first, inputs.checkpoints[base is not None :])

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
            self._inputs.close()
            for accelerator in self._accelerators:
                accelerator.empty_cache()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _settle(self) -> bool:
        """Bring the models to where they are merged; False where there is no memory for them, so that they stream."""
        if not self._accelerators:
            self._inputs.move_to_host()
            return True
        first = self._accelerators[0]
        if not self._inputs.fit(first):
            return False
        try:
            self._inputs.move_to(first)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        first.empty_cache()  # what others hold counts too: the budget was only a guess
        return False

    # -- one merge ------------------------------------------------------------------------------------------------

    def _plan(self, method: str, targets: Targets | None, dtype: str | None, parameters: dict[str, Any]) -> Plan:
        models = {name: f"experts/{name}" for name in self._inputs.experts}  # none of them is "base"
        base = None if self._inputs.base is None else "base"
        recipe = Recipe.from_flags(method, base, models, parameters, dtype=dtype)
        dtypes = {} if targets is None else {name: d for name, d in targets.dtypes.items() if is_float(d)}
        return self._planner.plan(recipe, methods.get(recipe.method), dtypes=dtypes)

    def _merge_into_new(self, plan: Plan, check_finite: bool) -> MergedStateDict:
        with _said_of_memory():
            sink = MemorySink(plan)
        beside = ExpertsInMemory()
        extraction = Extraction(plan, sink, beside) if plan.leaves_experts else None
        self._run(plan, sink, check_finite, extraction)
        results = {id(array): self._as_result(array) for array in sink.tensors.values()}
        merged = MergedStateDict((name, results[id(sink.tensors[name])]) for name in plan.base.tensors)
        merged.experts, merged.shared = tuple(beside.experts.values()), beside.shared
        return merged

    def _merge_into(self, plan: Plan, targets: Targets, check_finite: bool) -> None:
        device = self._accelerators[0].device if self._accelerators and self._resident else None
        sink = ModuleSink(plan, targets, self._shared, device)
        try:
            with _said_of_into():
                self._run(plan, sink, check_finite)
        finally:
            sink.tell_autograd()

    def _run(self, plan: Plan, sink, check_finite: bool, extraction: Extraction | None = None) -> None:
        if self._resident:
            with _said_of_memory():
                resident.run(plan, sink, extraction=extraction, check_finite=check_finite)
            return
        # results are in memory anyway: there is nothing to limit
        run = {"max_memory": 1 << 62, "check_finite": check_finite, "accelerators": self._accelerators}
        Stream(plan, sink, extraction=extraction, **run).run()

    def _as_result(self, array: Array) -> Array:
        return to_torch(array) if self._torch and not is_tensor(array) else array

    def _merge_to_disk(self, method: str, into, out, dtype, check_finite: bool, parameters: dict[str, Any]) -> Result:
        if into is not None:
            raise RecipeError("into and out: the result goes to one of them")
        if not self._inputs.on_disk:
            raise RecipeError("out: some models of this session are in memory; save them, and open it with their paths")
        options = {"dtype": dtype, "check_finite": check_finite, **self._options, **parameters}
        return api.merge(method, self._inputs.base, self._inputs.experts, out, **options)


@contextmanager
def _said_of_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedy = "write into an earlier result with into=..., or give the session a lower max_gpu_memory to stream"
        raise UnavailableError(f"the GPU's memory is full ({error}); {remedy}") from error


@contextmanager
def _said_of_into() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        text = error.args[0]
        raise CheckpointError(listed(text.listed, text.remedy, SPOILT)) from None
