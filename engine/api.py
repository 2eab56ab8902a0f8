"""The door: merge checkpoints on disk, or tensors in memory."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from freemerge import devices, methods, resident
from freemerge.accelerator import is_out_of_memory
from freemerge.chat_templates import chat_template
from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.manifest import MergeInput, write_manifest
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.reader import Checkpoint, open_adapter, open_checkpoint
from freemerge.checkpoint.source import split_adapters
from freemerge.checkpoint.tokenizer import write_chat_template
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.documents import Stage, load_stages, stages_yaml
from freemerge.errors import CheckpointError, InputError, RecipeError, UnavailableError, gathered
from freemerge.experts.extract import Extraction
from freemerge.experts.memory import ExpertsInMemory, MemoryExpert, apply_experts
from freemerge.experts.sidecar import ExpertFolder
from freemerge.kernels import dispatch
from freemerge.modules import plan_modules
from freemerge.placement import check_together, lies_on_gpu
from freemerge.plan import Plan, make_plan
from freemerge.recipe import Recipe, load_recipe
from freemerge.running_state import FOLDER, EarlierMerge, KeptState
from freemerge.settings import insist_on
from freemerge.sinks import DiskSink, MemorySink
from freemerge.sizes import parse_size
from freemerge.slices import plan_slices
from freemerge.stages import PlannedCheckpoint, StageFolder
from freemerge.stream import Stream
from freemerge.vocabulary import plan_vocabulary

Progress = Callable[[int, int], None]


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


class MergedStateDict(dict):
    """Merged tensors by name; `experts` are those a method like free leaves beside them, `shared` what they share."""

    experts: tuple[MemoryExpert, ...] = ()
    shared: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def with_experts(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """This model plus the sum of weight * expert, with one rounding: a new state dict.

            merged.with_experts({"math": 0.7, "code": 0.3})

        Args:
            weights: of experts by name, a router's probabilities, say.

        Raises:
            InputError: there is no such expert; or several are given, of which one replaces entries.
        """
        known = {expert.name: expert for expert in self.experts}
        if missing := sorted(set(weights) - set(known)):
            raise InputError(f"no expert {', '.join(map(repr, missing))}; there are: {', '.join(known) or 'none'}")
        return apply_experts(self, [(known[name], float(weight)) for name, weight in weights.items()])


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
        opened = _open_all(stages, allow_pickle, stack)
        plan_one = partial(_plan, run_by=tuple(map(str, accelerators)) or ("cpu",), shard_size=parse_size(shard_size))
        plans = _plan_ahead(stages, opened, plan_one)
        last = plans[stages[-1].name]
        if dry_run:
            return plans if len(stages) > 1 else last
        if out is None:
            raise RecipeError("no output directory; pass out=... (on the command line: OUT, or -o OUT)")
        dispatch.set_threads(threads)
        run = {"max_memory": parse_size(max_memory), "check_finite": check_finite, "accelerators": accelerators}
        run_one = partial(_run, run=run, resume=resume, overwrite=overwrite, fsync=fsync)
        if len(stages) > 1:
            with StageFolder(Path(out), overwrite=overwrite, resume=resume) as folder:
                _run_stages(stages, plans, opened, folder, Path(out), plan_one, run_one, progress)
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


def _run_stages(
    stages: Sequence[Stage],
    plans: Mapping[str | None, Plan],
    opened: Mapping[str, Checkpoint],
    folder: StageFolder,
    out: Path,
    plan_one: Callable,
    run_one: Callable,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(plan.bytes_in + plan.bytes_out for plan in plans.values())

    def tell(stage_done: int, _: int) -> None:
        progress(done + stage_done, total)

    with ExitStack() as stack:
        known = dict(opened)
        for stage in stages[:-1]:
            plan, place = plan_one(stage.recipe, known), folder.place(stage.name)
            fingerprint = plan.fingerprint
            if not folder.holds(stage.name, fingerprint):
                run_one(plan, place, progress=progress and tell, final=False)
                folder.note(stage.name, fingerprint)
            known[stage.name] = stack.enter_context(open_checkpoint(place))
            known[stage.name].label = stage.name
            done += plan.bytes_in + plan.bytes_out
        plan = plan_one(stages[-1].recipe, known)
        run_one(plan, out, progress=progress and tell, origin=_Origin.of_stages(stages, opened))


@dataclass(frozen=True)
class _Origin:
    """What card and manifest say a result was made from."""

    text: str
    data: Any
    inputs: list[MergeInput]

    @classmethod
    def of_plan(cls, plan: Plan) -> "_Origin":
        text = plan.recipe.to_yaml()
        inputs = [MergeInput.of(plan.base, "base")] if plan.recipe.base is not None else []
        inputs += plan.earlier.experts if plan.earlier else []
        inputs += [MergeInput.of(checkpoint, "expert") for checkpoint in plan.experts]
        return cls(text, yaml.safe_load(text), inputs)

    @classmethod
    def of_stages(cls, stages: Sequence[Stage], opened: Mapping[str, Checkpoint]) -> "_Origin":
        text = stages_yaml(stages)
        bases = {stage.recipe.base for stage in stages}
        inputs = [MergeInput.of(checkpoint, "base" if m in bases else "expert") for m, checkpoint in opened.items()]
        return cls(text, list(yaml.safe_load_all(text)), inputs)


def _run(
    plan: Plan,
    out: Path,
    *,
    run: dict[str, Any],
    resume: bool,
    overwrite: bool,
    fsync: bool,
    progress: Progress | None,
    origin: _Origin | None = None,
    final: bool = True,
) -> None:
    keeps_state = final and plan.keeps_state
    with WorkDir.open(out, fingerprint=plan.fingerprint, overwrite=overwrite, resume=resume, fsync=fsync) as work:
        try:
            with (
                CheckpointWriter(work.staging, plan.shards, fsync=fsync) as writer,
                KeptState(work.staging / FOLDER, plan, fsync=fsync) if keeps_state else nullcontext() as kept,
            ):
                sink = DiskSink(work, writer)
                extraction = _extraction_to_disk(plan, sink, work.staging / "experts", fsync)
                sink.resume(extraction.holds if extraction else lambda name, record: True)
                if extraction:
                    extraction.resume(sink.done)
                stream = Stream(replace(plan, kept=kept), sink, extraction=extraction, progress=progress, **run)
                stream.run()
                for checkpoint in plan.opened:
                    checkpoint.check_unchanged()
                writer.finish()
                if kept is not None:
                    kept.finish(stream.plan)
            _write_side_files(plan, sink.records, work.staging, origin or _Origin.of_plan(plan))
        except InputError:
            work.discard()  # nothing in it can be resumed
            raise
        work.publish()


def _write_side_files(plan: Plan, records: Mapping[str, dict], folder: Path, origin: _Origin) -> None:
    recipe, method = plan.recipe, plan.method
    tokenizer = plan.vocabulary.tokenizer if plan.vocabulary else None
    copy_side_files(plan.base, folder, dtype=plan.dtype, tokenizer=tokenizer, config=plan.config)
    if plan.chat_template is not None:
        write_chat_template(folder, plan.chat_template)
    names = [expert.name for expert in recipe.experts] if plan.leaves_experts else []
    library = getattr(plan.base, "library", "transformers")
    write_card(folder, method=method.name, recipe=origin.text, inputs=origin.inputs, experts=names, library=library)
    checksums = {name: record["checksum"] for name, record in records.items()}
    experts = {name: {} for name in names}
    write_manifest(
        folder,
        recipe=origin.data,
        inputs=origin.inputs,
        shards=plan.shards,
        checksums=checksums,
        experts=experts,
    )


def _extraction_to_disk(plan: Plan, sink: DiskSink, folder: Path, fsync: bool) -> Extraction | None:
    return Extraction(plan, sink, ExpertFolder(folder, fsync=fsync)) if plan.leaves_experts else None


def merge_state_dicts(
    method: str,
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    check_finite: bool = True,
    **parameters: Any,
) -> MergedStateDict:
    """Merge tensors in memory.

        merged = freemerge.merge_state_dicts("fr", base_state_dict, [math_state_dict, code_state_dict], scaling=0.4)

    Args:
        method: name of a method.
        base: name -> NumPy array or torch tensor, on the CPU or a CUDA GPU, of any dtype a checkpoint may have; None
            for a method without a base. Tensors are merged on the device they lie on; a model may lie on several, as
            long as its experts' tensors lie with the base's.
        experts: state dicts like `base`, in order, or by name. Nothing given is changed or kept.
        device: where arrays in host memory are merged, as for `merge`; the result is in host memory too. Tensors on a
            GPU are merged there whatever this says.
        dtype, threads, check_finite, parameters: as for `merge`.

    Returns:
        A dict of new tensors of the kind given, on the device of the base's, sorted by name. For a method that writes
        experts, `.experts` holds them, each with `.apply(state_dict)`.

    Raises:
        InputError: tensors do not fit together, all problems at once; or a GPU's memory ran out.
    """
    named = (
        dict(experts) if isinstance(experts, Mapping) else {f"expert{t}": expert for t, expert in enumerate(experts)}
    )
    recipe = Recipe.from_flags(
        method, "base" if base is not None else None, {n: n for n in named}, parameters, dtype=dtype
    )
    accelerators = devices.find_for([methods.get(method)], device)
    open_dict = partial(MemoryCheckpoint, device=accelerators[0].device if accelerators else None)
    found = [open_dict(state_dict, name) for name, state_dict in named.items()]
    reference = open_dict(base, "base") if base is not None else found[0] if found else open_dict({}, "base")
    plan = make_plan(recipe, methods.get(recipe.method), reference, found, shard_size=1 << 62)
    dispatch.set_threads(threads)
    check_together(plan)
    beside = ExpertsInMemory()
    with _out_of_memory_explained():
        sink = MemorySink(plan)
        extraction = Extraction(plan, sink, beside) if plan.leaves_experts else None
        run = {"extraction": extraction, "check_finite": check_finite}
        if lies_on_gpu(plan):
            resident.run(plan, sink, **run)
        else:
            Stream(plan, sink, max_memory=1 << 62, accelerators=accelerators, **run).run()
    merged = MergedStateDict((name, reference.like_input(name, sink.tensors[name])) for name in reference.tensors)
    merged.experts, merged.shared = tuple(beside.experts.values()), beside.shared
    return merged


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UnavailableError(
            "the GPU's memory ran out: inputs, result and a tensor's work have to fit there together; free some, or "
            'pass the tensors on the CPU and device="cuda", which streams them through the GPU'
        ) from error


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
    used = [*_parts(stages), *(stage.recipe.continue_from for stage in stages if stage.recipe.continue_from)]
    if out is not None and out.exists() and any(Path(m).exists() and out.samefile(m) for m in used):
        raise RecipeError(f"{out} is one of the inputs; choose another output directory")


def _inputs(stages: Sequence[Stage]) -> list[str]:
    """The models of all stages that none of them makes."""
    made = {stage.name for stage in stages}
    return list(dict.fromkeys(model for stage in stages for model in stage.recipe.models if model not in made))


def _parts(stages: Sequence[Stage]) -> list[str]:
    """The same, models and the adapters on them apart."""
    return [part for model, adapters in map(split_adapters, _inputs(stages)) for part in (model, *adapters)]


def _beneath(model: str, stages: Sequence[Stage]) -> str | None:
    """What an adapter alone may go on: the base of the first stage that it is merged in, if that is there already."""
    there = _inputs(stages)
    bases = (stage.recipe.base for stage in stages if model in stage.recipe.models)
    return next((base for base in bases if base in there and base != model), None)


def _open_all(stages: Sequence[Stage], allow_pickle: bool, stack: ExitStack) -> dict[str, Checkpoint]:
    """The models that no stage makes; all that cannot be opened in one error."""
    opened: dict[str, Checkpoint] = {}
    errors = []
    bare = any(methods.get(stage.recipe.method).merges_adapters for stage in stages)
    for model in _inputs(stages):
        try:
            if bare:
                checkpoint = open_adapter(model, allow_pickle=allow_pickle)
            else:
                checkpoint = open_checkpoint(model, allow_pickle=allow_pickle, base=_beneath(model, stages))
            opened[model] = stack.enter_context(checkpoint)
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(gathered(errors))
    return opened
