"""The door: merge checkpoints on disk. Tensors in memory: state_dicts.py."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from freemerge import devices, methods
from freemerge.chat_templates import chat_template
from freemerge.documents import Stage, load_stages
from freemerge.errors import RecipeError
from freemerge.kernels import dispatch
from freemerge.modules import plan_modules
from freemerge.opening import open_all, parts
from freemerge.plan import Plan, make_plan
from freemerge.publish import Progress, run, run_stages
from freemerge.recipe import Recipe, load_recipe
from freemerge.running_state import EarlierMerge
from freemerge.settings import insist_on
from freemerge.sizes import parse_size
from freemerge.slices import plan_slices
from freemerge.stages import PlannedCheckpoint, StageFolder
from freemerge.vocabulary import plan_vocabulary


@dataclass(frozen=True)
class Result:
    """What a merge left on disk.

    Attributes:
        out: the directory.
        tensors: how many tensors it holds.
        experts: names of the experts beside the merged model.
        bytes_in, bytes_out: bytes of input read and of tensors written.
        seconds: how long it took.
        warnings: what the plan had to say.
    """

    out: Path
    tensors: int
    experts: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    seconds: float
    warnings: tuple[str, ...]


def merge(
    method_or_recipe: str | os.PathLike,
    base: str | os.PathLike | None = None,
    experts: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = (),
    out: str | os.PathLike | None = None,
    *,
    dtype: str | None = None,
    device: str = "auto",
    threads: int = 0,
    max_memory: int | str = "2GiB",
    max_gpu_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    continue_from: str | os.PathLike | None = None,
    keep_state: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    check_finite: bool = True,
    fsync: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> Result | Plan | dict[str | None, Plan]:
    """Merge checkpoints on disk into a new checkpoint on disk.

        freemerge.merge("free", base="llama", experts=["math", "code"], out="merged", scaling=0.4)
        freemerge.merge("recipe.yml", out="merged")

    Args:
        method_or_recipe: name of a method (`freemerge methods` lists them), or a recipe, a file or YAML text, which
            names its models itself; `parameters` and `dtype` then go before its own.
        base, experts: directories, files or hub names, with LoRA adapters as `model+adapter`; experts also adapters
            alone, and as a mapping of names to them.
        out: the directory to write. It appears complete or not at all.
        dtype: of the result's floating tensors; that of the base, tensor by tensor, if not given.
        device: "auto" (every visible GPU, or the CPU where there is none to use), "cpu", "cuda" or "cuda:N".
        threads: 0 is one for each core.
        max_memory: bytes of anonymous memory to stay under; mapped files and CUDA's own do not count.
        max_gpu_memory: bytes to stay under on each GPU; 80 % of what is free there if not given.
        shard_size: bytes a shard of the result may have.
        continue_from: output of an earlier merge by the same method, whose experts these are added to; for methods that
            take experts one after the other (opcm) and from the same base. The result is what all at once would give.
        keep_state: leave beside the result (`out`/state) what `continue_from` needs, 4 bytes for each element of a
            merged tensor; done if not given, where the method can.
        resume: continue an interrupted merge of the same recipe into the same `out`.
        overwrite: replace an existing `out` when the new one is complete.
        allow_pickle: also read PyTorch .bin and .pt files, through torch's weights_only loader.
        check_finite: refuse a result with NaN or Inf in it.
        fsync: return only when the result is on the disk, not just in the system's cache.
        dry_run: check everything, write nothing, return the Plan.
        progress: called as progress(done_bytes, total_bytes), from any thread.
        parameters: of the method, as in a recipe.

    Returns:
        A Result; with `dry_run` the Plan, of a recipe of several documents the plans by their names.

    Raises:
        InputError: recipe or checkpoints are not in order; all problems at once, nothing is written.
        OutputError: the result could not be written; an existing `out` is as it was.
    """
    start = time.perf_counter()
    state = {"continue_from": continue_from and os.fspath(continue_from), "keep_state": keep_state}
    stages = _stages(method_or_recipe, base, experts, dtype, parameters, state)
    used = [methods.get(stage.recipe.method) for stage in stages]
    accelerators = devices.find_for(used, device, None if max_gpu_memory is None else parse_size(max_gpu_memory))
    _check_recipes(stages, None if out is None else Path(out))
    with ExitStack() as stack:
        opened = open_all(stages, allow_pickle, stack)
        plan_one = partial(_plan, run_by=tuple(map(str, accelerators)) or ("cpu",), shard_size=parse_size(shard_size))
        plans = _plan_ahead(stages, opened, plan_one)
        last = plans[stages[-1].name]
        if dry_run:
            return plans if len(stages) > 1 else last
        if out is None:
            raise RecipeError("no output directory; pass out=... (on the command line: OUT, or -o OUT)")
        dispatch.set_threads(threads)
        stream = {"max_memory": parse_size(max_memory), "check_finite": check_finite, "accelerators": accelerators}
        run_one = partial(run, stream=stream, resume=resume, overwrite=overwrite, fsync=fsync)
        if len(stages) > 1:
            with StageFolder(Path(out), overwrite=overwrite, resume=resume) as folder:
                run_stages(stages, plans, opened, folder, Path(out), plan_one, run_one, progress)
        else:
            run_one(last, Path(out), progress=progress)
        names = tuple(expert.name for expert in last.recipe.experts) if last.leaves_experts else ()
        bytes_in, bytes_out = (sum(getattr(p, key) for p in plans.values()) for key in ("bytes_in", "bytes_out"))
        warnings = tuple(warning for plan in plans.values() for warning in plan.warnings)
        return Result(Path(out), len(last.tasks), names, bytes_in, bytes_out, time.perf_counter() - start, warnings)


def _plan(recipe: Recipe, opened: Mapping[str, Any], *, run_by: tuple[str, ...], shard_size: int) -> Plan:
    """The plan of one merge; without a base the first model is the one to copy from."""
    method = methods.get(recipe.method)
    lay = plan_modules if recipe.modules else plan_slices if recipe.slices else make_plan
    experts = [opened[expert.model] for expert in recipe.experts]
    vocabulary = plan_vocabulary(recipe, opened) if recipe.tokenizer else None
    plan = lay(recipe, method, opened[recipe.models[0]], experts, shard_size=shard_size, vocabulary=vocabulary)
    earlier = None
    if recipe.continue_from is not None:
        earlier = EarlierMerge(recipe.continue_from, method.name)
        earlier.insist_on(plan)
    template = chat_template(recipe.chat_template, [opened[model] for model in recipe.models])
    warnings = [*_idle_base(recipe), *(vocabulary.warnings if vocabulary else ()), *plan.warnings]
    return replace(plan, devices=run_by, chat_template=template, warnings=warnings, earlier=earlier)


def _idle_base(recipe: Recipe) -> list[str]:
    """Where mergekit merges a base that is not among the models, and freemerge does not."""
    models = {expert.model for expert in recipe.experts}
    if recipe.base is None or recipe.method not in ("linear", "karcher") or recipe.base in models or recipe.slices:
        return []
    return [
        f"base_model takes no part in {recipe.method}; to have it merged, as mergekit does, list it with the models"
    ]


def _plan_ahead(stages: Sequence[Stage], opened: Mapping[str, Any], plan_one: Callable) -> dict[str | None, Plan]:
    """Plans of all stages by name, from headers alone: those of results that are yet to be made as well."""
    plans, known = {}, dict(opened)
    for stage in stages:
        plans[stage.name] = plan = plan_one(stage.recipe, known)
        known[stage.name] = PlannedCheckpoint(plan, stage.name)
    return plans


def _stages(method_or_recipe, base, experts, dtype, parameters, state) -> tuple[Stage, ...]:
    said = os.fspath(method_or_recipe)
    if said in methods.names() or base is not None or experts:
        return (Stage(None, Recipe.from_flags(said, base, experts, parameters, dtype=dtype, **state)),)
    state = {key: value for key, value in state.items() if value is not None}
    if parameters or dtype or state:
        return (Stage(None, replace(load_recipe(method_or_recipe).overridden(parameters, dtype), **state)),)
    return load_stages(method_or_recipe)


def _check_recipes(stages: Sequence[Stage], out: Path | None) -> None:
    """What can be said before any checkpoint is opened."""
    for stage in stages:
        insist_on(stage.recipe, methods.get(stage.recipe.method))
    bare = [s.recipe.method for s in stages if methods.get(s.recipe.method).merges_adapters]
    if bare and len(stages) > 1:
        raise RecipeError(f"{bare[0]} merges adapters into an adapter: give it a recipe of one document")
    used = [*parts(stages), *(stage.recipe.continue_from for stage in stages if stage.recipe.continue_from)]
    if out is not None and out.exists() and any(Path(m).exists() and out.samefile(m) for m in used):
        raise RecipeError(f"{out} is one of the inputs; choose another output directory")
