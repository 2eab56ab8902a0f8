"""The running state of a merge that takes experts one after the other: what it takes to add one more later.

OUT/state/METHOD.safetensors   an array of the method's for each merged tensor, float32, in its shape
          METHOD.json          the method's numbers, the parameters, and which base and experts they come from

Arrays are kept as they were computed with, so that experts added later give the bits that all at once would give.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.checkpoint.layout import Entry, plan_shard
from freemerge.checkpoint.manifest import MergeInput, input_facts
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.writer import CheckpointWriter, write_file
from freemerge.errors import CheckpointError, PlanError, listed
from freemerge.kernels.array import Array
from freemerge.plan import Plan
from freemerge.settings import layer_positions, settings

FOLDER = "state"
FORMAT = 1
FLOAT32 = np.dtype(np.float32)
REMEDY = "Continue with the same method, base and parameters and with new experts, or merge all experts at once."
MISSING = "Give the output of a merge that kept its state, or merge all experts at once."


class EarlierMerge:
    """The state that a merge before left in its output directory.

    Raises:
        CheckpointError: there is none, or it is broken.
    """

    def __init__(self, folder: str, method: str):
        path = Path(folder).expanduser() / FOLDER
        self.label, self.method = folder, method
        try:
            self.facts = json.loads((path / f"{method}.json").read_bytes())
            found, self._parameters = self.facts["format"], dict(self.facts["parameters"])
            inputs = [self.facts["base"], *self.facts["experts"]]
            self.base, *self.experts = (_restored(facts) for facts in inputs)
        except FileNotFoundError:
            raise CheckpointError(listed([f"{folder} holds no {FOLDER}/{method}.json"], MISSING)) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{path}/{method}.json cannot be read: {type(error).__name__} {str(error)[:200]}"
            raise CheckpointError(listed([problem], MISSING)) from None
        if found != FORMAT:
            raise CheckpointError(listed([f"{path}/{method}.json is of format {found}, not {FORMAT}"], MISSING))
        self.checkpoint: Checkpoint = open_checkpoint(path / f"{method}.safetensors")

    def array(self, name: str) -> Array:
        """Of a merged tensor."""
        return self.checkpoint.read(name)

    def insist_on(self, plan: Plan) -> None:
        """Raise PlanError with everything for which `plan` is no continuation of the merge this was left by."""
        if problems := [f"{self.label}: {problem}" for problem in self._problems(plan)]:
            raise PlanError(listed(problems, REMEDY))

    def _problems(self, plan: Plan) -> list[str]:
        return [*self._other_inputs(plan), *self._other_parameters(plan), *self._other_tensors(plan)]

    def _other_inputs(self, plan: Plan) -> list[str]:
        problems, base = [], _contents(MergeInput.of(plan.base, "base"))
        if base != _contents(self.base):
            problems.append(f"its base was {self.base.name}, not {plan.base.label}, or that has changed since")
        # two fine-tunes that the hash cannot tell from their base it cannot tell from each other
        before = {_contents(item): item.name for item in self.experts if _contents(item) != _contents(self.base)}
        for expert in plan.experts:
            if name := before.get(_contents(MergeInput.of(expert, "expert"))):
                problems.append(f"{expert.label} is in it already, as {name}")
        return problems

    def _other_parameters(self, plan: Plan) -> list[str]:
        then = replace(plan.recipe, parameters=self._parameters)
        positions = layer_positions(plan.base.tensors)
        for task in plan.measured:
            before = settings(then, plan.method, task.name, positions[task.name])
            for key, value in task.settings.items():
                if before[key] != value:
                    return [f"{key} was {_plain(before[key])}, not {_plain(value)} ({task.name})"]
        return []

    def _other_tensors(self, plan: Plan) -> list[str]:
        ours = {task.name: task.shape for task in plan.measured}
        theirs = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return [f"its state does not hold the tensors of this merge, {differing[0]} for one"] if differing else []


class KeptState:
    """The state of a merge that is under way, written into a folder of its result.

    Args:
        plan: of a method that keeps a state.
    """

    def __init__(self, folder: Path, plan: Plan, *, fsync: bool):
        folder.mkdir(exist_ok=True)
        self._folder, self._method = folder, plan.method
        entries = [Entry(task.name, FLOAT32, task.shape) for task in plan.measured]
        self._writer = CheckpointWriter(folder, [plan_shard(f"{plan.method.name}.safetensors", entries)], fsync=fsync)
        self.array = self._writer.map

    def finish(self, plan: Plan) -> None:
        """Write the numbers and what they come from; `plan` has been measured."""
        self._writer.finish()
        before = plan.earlier.experts if plan.earlier else []
        experts = [*before, *(MergeInput.of(checkpoint, "expert") for checkpoint in plan.experts)]
        facts = {
            "format": FORMAT,
            "method": self._method.name,
            "parameters": plan.recipe.parameters,
            "base": input_facts(MergeInput.of(plan.base, "base")),
            "experts": [input_facts(item) for item in experts],
            **self._method.module.state_facts(plan.settled),
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        write_file(self._folder / f"{self._method.name}.json", f"{text}\n".encode())

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "KeptState":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _restored(facts: Mapping[str, Any]) -> MergeInput:
    label, *adapters = facts["name"].split("+")
    return MergeInput(label, facts["role"], facts["license"], facts["files"], tuple(adapters))


def _contents(item: MergeInput) -> tuple[str, ...]:
    """What the files of a model hold, whatever they are called."""
    return tuple(sorted(str(facts["xxh3_128"]) for facts in item.fingerprint.values()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
