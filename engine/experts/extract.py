"""Experts cut out while their backbone is made: parts as each tensor is finished, scales when all of them are known."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from freemerge.checkpoint.manifest import backbone_fingerprint
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.kernels.array import Array, is_tensor
from freemerge.kernels.sparse_rows import Selection
from freemerge.parts import Arrays, Cut, Layout
from freemerge.plan import Plan, TensorTask

IN_MEMORY = "in memory"  # where there are no checksums


class Extraction:
    """The experts of one merge, cut out of it through the hooks of its method (methods/__init__.py).

    Args:
        plan: of a method that writes experts.
        sink: where the backbone goes; it is read back for thresholds that hold for the whole model.
        folder: where experts go (sidecar.ExpertFolder, memory.ExpertsInMemory).
    """

    def __init__(self, plan: Plan, sink, folder):
        self.plan, self.sink, self._folder = plan, sink, folder
        self._hooks = plan.method.module
        self._tasks = plan.measured
        self._settings = self._tasks[0].settings if self._tasks else {}
        self._layouts = {task.name: layout for task in self._tasks if (layout := self._layout(task))}
        self._statistics: dict[str, list[dict]] = {}
        self._shared_checksums: dict[str, str | None] = {}
        self._over_model = self._hook("expert_scope", "tensor") == "model"
        shared = {task.name: arrays for task in self._tasks if (arrays := self._shared_arrays(task))}
        self._shared = folder.open_shared(plan.method.name, shared) if shared else None
        if not self._over_model:
            self._sidecars = [self._open(t, self._layouts) for t in range(len(plan.experts))]

    def cut(self, task: TensorTask, base: Array, merged: Array, experts: Sequence[Array | None]) -> Cut | None:
        """What each expert keeps of one finished tensor; None where that waits for the whole model."""
        return None if self._over_model else self._cut(task, base, merged, experts)

    def write(self, task: TensorTask, cut: Cut | None) -> dict[str, Any]:
        """Write what `cut` answered; answer what to note of it in the journal."""
        if cut is None:
            return {}
        cut = self._back(task, cut)
        shared = self._shared.write(task.name, cut.shared) if cut.shared else None
        checksums = [
            None if part is None else sidecar.write(task.name, part)
            for sidecar, part in zip(self._sidecars, cut.parts, strict=True)
        ]
        self._take_over(task.name, list(cut.statistics), shared)
        return {"experts": checksums, "shared": shared, "statistics": list(cut.statistics)}

    def holds(self, name: str, record: Mapping[str, Any]) -> bool:
        """Whether what an interrupted run noted for a tensor is still in the experts' files."""
        if self._over_model:
            return True
        files = [*self._sidecars, self._shared]
        noted = [*record.get("experts", []), record.get("shared")]
        return all(
            checksum is None or file.checksum(name) == checksum for file, checksum in zip(files, noted, strict=False)
        )

    def resume(self, records: Mapping[str, dict]) -> None:
        """Take over what is known of the tensors that an interrupted run has finished."""
        for name, record in records.items():
            if "statistics" in record:
                self._take_over(name, record["statistics"], record["shared"])

    def finish(self) -> None:
        """Write what had to wait for the whole model, and the scales."""
        if self._over_model:
            self._select_over_model()
        checksums = {name: record["checksum"] for name, record in self.sink.records.items()}
        facts = {"method": self.plan.method.name, "mode": self._hook("expert_mode", "add")}
        facts["backbone"] = backbone_fingerprint(checksums) if checksums else IN_MEMORY
        facts |= {key: self._settings[key] for key in getattr(self._hooks, "DESCRIBED", ())}
        if self._shared is not None:
            known = {name: checksum for name, checksum in self._shared_checksums.items() if checksum}
            facts["shared"] = backbone_fingerprint(known) if known else IN_MEMORY
            names = json.dumps([expert.name for expert in self.plan.recipe.experts], ensure_ascii=False)
            self._shared.finish({"method": self.plan.method.name, "fingerprint": facts["shared"], "experts": names})
        for t, (expert, sidecar) in enumerate(zip(self.plan.recipe.experts, self._sidecars, strict=True)):
            statistics = [self._statistics[task.name][t] for task in self._tasks]
            mu = self._hook("expert_scale", 1.0, statistics)
            sidecar.finish({"expert": expert.name, **facts, "mu": mu}, self._scales(mu))

    # -- hooks --------------------------------------------------------------------------------------------------

    def _hook(self, name: str, default: Any, *arguments) -> Any:
        """What a hook of the whole model answers; `default` where the method has none."""
        hook = getattr(self._hooks, name, None)
        return default if hook is None else hook(*arguments, **self._settings)

    def _layout(self, task: TensorTask) -> Layout | None:
        base = self.plan.base.tensors[task.name]
        return self._hooks.plan_expert(task.name, task.shape, base.dtype, **task.settings)

    def _shared_arrays(self, task: TensorTask) -> Arrays:
        hook = getattr(self._hooks, "plan_shared", None)
        given = {"experts": len(self.plan.experts), **task.settings}
        return {} if hook is None else hook(task.name, task.shape, task.dtype, **given)

    def _scales(self, mu: float) -> dict[str, float]:
        hook = getattr(self._hooks, "tensor_scale", None)
        if hook is None:
            return dict.fromkeys(self._layouts, mu)
        return {
            task.name: hook(mu, task.name, task.shape, **task.settings)
            for task in self._tasks
            if task.name in self._layouts
        }

    # -- one tensor ---------------------------------------------------------------------------------------------

    def _cut(self, task: TensorTask, base: Array, merged: Array, experts: Sequence[Array | None], **within) -> Cut:
        return self._hooks.cut_experts(base, merged, experts, name=task.name, **within, **task.settings)

    def _open(self, t: int, layouts: Mapping[str, Layout]):
        taking_part = [task.name for task in self._tasks if task.match.sources[t] is not None]
        held = {name: layouts[name] for name in taking_part if name in layouts}
        return self._folder.open(self.plan.recipe.experts[t].name, held)

    def _take_over(self, name: str, statistics: list[dict], shared: str | None) -> None:
        self._statistics[name], self._shared_checksums[name] = statistics, shared

    def _back(self, task: TensorTask, cut: Cut) -> Cut:
        """What was cut out on a GPU, back where the inputs came from."""
        origin = self.plan.base.read(task.name)
        return cut if is_tensor(origin) else cut.moved(lambda array: placed_like(array, origin))

    # -- the whole model ----------------------------------------------------------------------------------------

    def _select_over_model(self) -> None:
        """A second pass: thresholds over all covered tensors of an expert, then their entries."""
        chosen = [self._selections(t) for t in range(len(self.plan.experts))]
        self._sidecars = [
            self._open(t, {name: layout for name, (_, layout) in selected.items()}) for t, selected in enumerate(chosen)
        ]
        for task in self._tasks:
            within = [selected[task.name][0] if task.name in selected else None for selected in chosen]
            base, merged = self.plan.base.read(task.name), self.sink.read(task.name)
            self.write(task, self._cut(task, base, merged, self.plan.read_experts(task), within=within))

    def _selections(self, t: int) -> dict[str, tuple[Selection, Layout]]:
        """What one expert keeps of each covered tensor, and how that is laid out."""
        tasks = [task for task in self._tasks if task.name in self._layouts and task.match.sources[t] is not None]
        bases = [self.plan.base.read(task.name) for task in tasks]
        merged = [self.sink.read(task.name) for task in tasks]
        experts = [self.plan.read_experts(task)[t] for task in tasks]
        found = self._hooks.select_over_model(bases, merged, experts, **self._settings)
        return dict(zip((task.name for task in tasks), found, strict=True))
