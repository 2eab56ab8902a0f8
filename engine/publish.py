"""Plans run into directories that appear complete or not at all."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.manifest import MergeInput, write_manifest
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.tokenizer import write_chat_template
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.documents import Stage, stages_yaml
from freemerge.errors import InputError
from freemerge.experts.extract import Extraction
from freemerge.experts.sidecar import ExpertFolder
from freemerge.plan import Plan
from freemerge.running_state import FOLDER, KeptState
from freemerge.sinks import DiskSink
from freemerge.stages import StageFolder
from freemerge.stream import Stream

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Origin:
    """What card and manifest say a result was made from."""

    text: str
    data: Any
    inputs: list[MergeInput]

    @classmethod
    def of_plan(cls, plan: Plan) -> "Origin":
        text = plan.recipe.to_yaml()
        inputs = [MergeInput.of(plan.base, "base")] if plan.recipe.base is not None else []
        inputs += plan.earlier.experts if plan.earlier else []
        inputs += [MergeInput.of(checkpoint, "expert") for checkpoint in plan.experts]
        return cls(text, yaml.safe_load(text), inputs)

    @classmethod
    def of_stages(cls, stages: Sequence[Stage], opened: Mapping[str, Checkpoint]) -> "Origin":
        text = stages_yaml(stages)
        bases = {stage.recipe.base for stage in stages}
        inputs = [MergeInput.of(checkpoint, "base" if m in bases else "expert") for m, checkpoint in opened.items()]
        return cls(text, list(yaml.safe_load_all(text)), inputs)


def run(
    plan: Plan,
    out: Path,
    *,
    stream: dict[str, Any],
    resume: bool,
    overwrite: bool,
    fsync: bool,
    progress: Progress | None,
    origin: Origin | None = None,
    final: bool = True,
) -> None:
    """Merge into `out`, and whatever belongs beside the tensors.

    Args:
        stream: what stream.Stream is given.
        origin: of the result, where not the plan says it.
        final: not a stage of a recipe that others follow.
    """
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
                running = Stream(replace(plan, kept=kept), sink, extraction=extraction, progress=progress, **stream)
                running.run()
                for checkpoint in plan.opened:
                    checkpoint.check_unchanged()
                writer.finish()
                if kept is not None:
                    kept.finish(running.plan)
            _write_side_files(plan, sink.records, work.staging, origin or Origin.of_plan(plan))
        except InputError:
            work.discard()  # nothing in it can be resumed
            raise
        work.publish()


def run_stages(
    stages: Sequence[Stage],
    plans: Mapping[str | None, Plan],
    opened: Mapping[str, Checkpoint],
    folder: StageFolder,
    out: Path,
    plan_one: Callable,
    run_one: Callable,
    progress: Progress | None,
) -> None:
    """One plan after the other: all but the last into `folder`, where an interrupted run may have left them."""
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
        run_one(plan, out, progress=progress and tell, origin=Origin.of_stages(stages, opened))


def _write_side_files(plan: Plan, records: Mapping[str, dict], folder: Path, origin: Origin) -> None:
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
