"""Experts cut out while their backbone is made: rows as each tensor is finished, scales when all of them are known."""

from collections.abc import Callable, Sequence
from typing import Any

from freemerge.checkpoint.manifest import backbone_fingerprint
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.experts.sidecar import SparseEntry
from freemerge.kernels.array import Array, SparseRows, is_tensor
from freemerge.kernels.sparse_rows import Selection
from freemerge.plan import Plan, TensorTask

# What a reader of an expert's file may want to know of how it was made
DESCRIBED = ("density", "removal", "selection", "relative_to", "rescale")


class Extraction:
    """The experts of one merge, cut out of it through the hooks of its method (methods/__init__.py).

    Args:
        plan: of a method that writes experts.
        sink: where the backbone goes; it is read back for thresholds that hold for the whole model.
        open_sidecar: (name of an expert, entries) -> what `write(tensor, rows, start)` and `finish(metadata, scales)`
            are called on.
    """

    def __init__(self, plan: Plan, sink, open_sidecar: Callable):
        self.plan, self.sink, self._open = plan, sink, open_sidecar
        self._hooks = plan.method.module
        self._tasks = [task for task in plan.tasks if task.settings is not None and not task.match.same_as]
        self._covered = [task for task in self._tasks if self._count(task)]
        self._settings = self._tasks[0].settings if self._tasks else {}
        self._statistics: dict[str, list[dict]] = {}
        self._over_model = self._hooks.expert_scope(**self._settings) == "model"
        self._mode = self._hooks.expert_mode(**self._settings)
        if not self._over_model:
            counts = {task.name: self._count(task) for task in self._covered}
            self._sidecars = [self._open_sidecar(t, counts) for t in range(len(plan.experts))]

    def extract(self, task: TensorTask, base: Array, merged: Array, experts: Sequence[Array | None]) -> dict[str, Any]:
        """Write what each expert keeps of one finished tensor; answer what to note of it in the journal."""
        if self._over_model:
            return {}
        within = [None] * len(experts)
        return {"experts": self._cut(task, base, merged, experts, within), "statistics": self._statistics[task.name]}

    def holds(self, name: str, record: dict[str, Any]) -> bool:
        """Whether the rows an interrupted run noted for a tensor are still in the experts' files."""
        written = zip(self._sidecars, record.get("experts", []), strict=False) if not self._over_model else ()
        return all(checksum is None or sidecar.checksum(name) == checksum for sidecar, checksum in written)

    def resume(self, records: dict[str, dict]) -> None:
        """Take over the statistics of the tensors an interrupted run has finished."""
        self._statistics |= {name: record["statistics"] for name, record in records.items() if "statistics" in record}

    def finish(self) -> None:
        """Write what had to wait for the whole model, and the scales."""
        if self._over_model:
            self._select_over_model()
        checksums = {name: record["checksum"] for name, record in self.sink.records.items()}
        described = {key: self._settings[key] for key in DESCRIBED if key in self._settings}
        for t, (expert, sidecar) in enumerate(zip(self.plan.recipe.experts, self._sidecars, strict=True)):
            mu = self._hooks.expert_scale([self._statistics[task.name][t] for task in self._tasks], **self._settings)
            scales = {
                task.name: self._hooks.tensor_scale(mu, task.name, task.shape, **task.settings)
                for task in self._covered
            }
            facts = {
                "expert": expert.name,
                "method": self.plan.method.name,
                "mode": self._mode,
                "backbone": backbone_fingerprint(checksums) if checksums else "in memory",
                "mu": mu,
            }
            sidecar.finish({**facts, **described}, scales)

    def _count(self, task: TensorTask) -> int:
        return self._hooks.expert_count(task.name, task.shape, **task.settings)

    def _open_sidecar(self, t: int, counts: dict[str, int]):
        start = self._mode == "replace"
        base = self.plan.base.tensors
        taking_part = [task for task in self._covered if task.match.sources[t] is not None]
        entries = [
            SparseEntry(task.name, task.shape, counts[task.name], base[task.name].dtype if start else None)
            for task in taking_part
        ]
        return self._open(self.plan.recipe.experts[t].name, entries)

    def _cut(self, task: TensorTask, base, merged, experts, within: Sequence[Selection | None]) -> list[str | None]:
        """Write the rows of every expert, keep the statistics for their scales; answer the rows' checksums."""
        rows: list[SparseRows | None] = [None] * len(experts)
        checksums: list[str | None] = [None] * len(experts)
        for t, expert in enumerate(experts):
            if expert is None or not self._count(task):
                continue
            rows[t] = self._hooks.extract_expert(
                base, merged, expert, name=task.name, within=within[t], **task.settings
            )
            start = rows[t].gather(base) if self._mode == "replace" else None
            checksums[t] = self._sidecars[t].write(task.name, *self._back(task, rows[t], start))
        self._statistics[task.name] = self._hooks.measure_tensor(
            base, merged, experts, rows, name=task.name, **task.settings
        )
        return checksums

    def _back(self, task: TensorTask, rows: SparseRows, start: Array | None) -> tuple[SparseRows, Array | None]:
        """Rows cut out on a GPU, back where the inputs came from."""
        origin = self.plan.base.read(task.name)
        if is_tensor(origin):
            return rows, start
        return rows.on_host(), None if start is None else placed_like(start, origin)

    def _select_over_model(self) -> None:
        """A second pass: thresholds over all covered tensors of an expert, then their entries."""
        chosen = [self._selections(t) for t in range(len(self.plan.experts))]
        self._sidecars = [
            self._open_sidecar(t, {name: count for name, (_, count) in selected.items()})
            for t, selected in enumerate(chosen)
        ]
        for task in self._tasks:
            within = [selected[task.name][0] if task.name in selected else None for selected in chosen]
            base, merged = self.plan.base.read(task.name), self.sink.read(task.name)
            self._cut(task, base, merged, self.plan.read_experts(task), within)

    def _selections(self, t: int) -> dict[str, tuple[Selection, int]]:
        """What one expert keeps of each covered tensor, and how many entries that is."""
        tasks = [task for task in self._covered if task.match.sources[t] is not None]
        bases = [self.plan.base.read(task.name) for task in tasks]
        merged = [self.sink.read(task.name) for task in tasks]
        experts = [self.plan.read_experts(task)[t] for task in tasks]
        found = self._hooks.select_over_model(bases, merged, experts, **self._settings)
        return dict(zip((task.name for task in tasks), found, strict=True))
