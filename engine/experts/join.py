"""Several LoRA adapters as one: their weighted sum, exactly, by putting their factors side by side.

    sum_t w_t (alpha_t / r_t) B_t A_t = [w_1 (alpha_1 / r_1) B_1, w_2 (alpha_2 / r_2) B_2, ...] [A_1; A_2; ...]

Each B meets its own A alone. The ranks add up.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from freemerge.checkpoint.adapter import CONFIG
from freemerge.checkpoint.bare_adapter import WEIGHTS, BareAdapter
from freemerge.checkpoint.layout import Entry, plan_shard
from freemerge.checkpoint.reader import open_adapter
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter, write_file
from freemerge.errors import InputError, listed
from freemerge.lora_names import Part, is_factor, part_of

REMEDY = "Apply the adapters to their base instead, BASE+ADAPTER, and merge the models."
PREFIX = "base_model.model."  # of every name
FLOAT32 = np.dtype(np.float32)


def join_adapters(
    adapters: Mapping[str | os.PathLike, float] | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    fsync: bool = True,
) -> dict[str, int]:
    """Write the adapter `out`, whose update of every layer is the weighted sum of those of `adapters`, in float32.

        join_adapters({"math-lora": 0.7, "code-lora": 0.3}, "both-lora")

    Args:
        adapters: directories or hub names, with weights or, in a sequence, each with 1. They may differ in rank, alpha
            and target modules.
        overwrite, allow_pickle, fsync: as for freemerge.merge.

    Returns:
        The rank of every module, by its path.

    Raises:
        InputError: what cannot be joined exactly, all of it at once.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(name, allow_pickle=allow_pickle)) for name in weights]
        problems = list(_problems(opened))
        if problems:
            raise InputError(listed(problems, REMEDY))
        joined = _Joined([_Weighted(one, float(w)) for one, w in zip(opened, weights.values(), strict=True)])
        with WorkDir.open(Path(out), fingerprint="join", overwrite=overwrite, resume=False, fsync=fsync) as work:
            with CheckpointWriter(work.staging, [plan_shard(WEIGHTS, joined.entries())], fsync=fsync) as writer:
                for name in joined.names:
                    writer.write(name, 0, joined.tensor(name))
                writer.finish()
            for adapter in opened:
                adapter.check_unchanged()
            write_file(work.staging / CONFIG, (json.dumps(joined.config(), indent=2) + "\n").encode())
            work.publish()
    return joined.ranks


@dataclass(frozen=True)
class _Weighted:
    adapter: BareAdapter
    weight: float

    def factor(self, name: str) -> np.ndarray:
        """A as it is, or B with weight and scaling in it; float32."""
        part, array = part_of(name), self.adapter.read(name).astype(np.float32)
        if part.part.endswith("_A"):
            return array
        return np.float32(self.weight * self.adapter.rank_and_scaling(_path(part))[1]) * array


class _Joined:
    """What becomes of the adapters: `names` of tensors, in order, and the `ranks` of modules by path."""

    def __init__(self, items: Sequence[_Weighted]):
        self._items = items
        self.names = sorted({name for item in items for name in item.adapter.tensors})
        shapes = {name: self._shape(name) for name in self.names}
        self._shapes = shapes
        firsts = [(part_of(name), shape) for name, shape in shapes.items()]
        self.ranks = {_path(part): shape[0] for part, shape in firsts if part.part.endswith("_A")}

    def _shape(self, name: str) -> tuple[int, ...]:
        found = [item.adapter.tensors[name].shape for item in self._items if name in item.adapter.tensors]
        along = _axis(name)
        return (*found[0][:along], sum(shape[along] for shape in found), *found[0][along + 1 :])

    def entries(self) -> Iterator[Entry]:
        return (Entry(name, FLOAT32, self._shapes[name]) for name in self.names)

    def tensor(self, name: str) -> np.ndarray:
        factors = [item.factor(name) for item in self._items if name in item.adapter.tensors]
        return np.ascontiguousarray(np.concatenate(factors, _axis(name)))

    def config(self) -> dict:
        """The first adapter's, with the ranks there are now, and alphas that make every scaling 1."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0]
        own = {f"^{path}$".replace(".", r"\."): r for path, r in self.ranks.items() if r != rank}
        changed = {"r": rank, "lora_alpha": rank, "rank_pattern": own, "alpha_pattern": own, "use_rslora": False}
        changed |= {"target_modules": sorted(self.ranks), "layers_to_transform": None, "layers_pattern": None}
        changed |= {"exclude_modules": None, "init_lora_weights": True, "inference_mode": True}
        return self._items[0].adapter.adapter_config | changed


def _problems(adapters: Sequence[BareAdapter]) -> Iterator[str]:
    if not adapters:
        yield "no adapter is given"
        return
    for adapter in adapters:
        if adapter.adapter_config.get("use_dora"):
            yield f"{adapter.label}: a DoRA adapter; its magnitudes rescale whole weights"
        others = [name for name in adapter.tensors if not is_factor(name) and "magnitude" not in name]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            yield f"{adapter.label}: {others[0]}{more}: replaces what is in the base, and is no factor"
        yield from _broken(adapter)
    yield from _misfits(adapters)


def _broken(adapter: BareAdapter) -> Iterator[str]:
    """Modules without both factors, or of another rank than their configuration says."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in filter(is_factor, adapter.tensors):
        part, shape = part_of(name), adapter.tensors[name].shape
        found.setdefault((part.module, part.part[:-2]), []).append(shape[_axis(name)] if len(shape) > 1 else 0)
    for (module, _), ranks in found.items():
        rank, _ = adapter.rank_and_scaling(module.removeprefix(PREFIX))
        if len(ranks) < 2:
            yield f"{adapter.label}: {module}: an A without a B, or a B without an A"
        elif set(ranks) != {rank}:
            yield f"{adapter.label}: {module}: of rank {ranks[0]} and {ranks[1]}, but the configuration says {rank}"


def _misfits(adapters: Sequence[BareAdapter]) -> Iterator[str]:
    first = adapters[0]
    for other in adapters[1:]:
        for key, told in (
            ("fan_in_fan_out", bool),
            ("base_model_name_or_path", lambda name: name and PurePath(name).name),
        ):
            ours, theirs = (told(one.adapter_config.get(key)) for one in (first, other))
            if ours != theirs:
                yield f"{key}: {ours} in {first.label}, {theirs} in {other.label}"
        for name in sorted(filter(is_factor, first.tensors.keys() & other.tensors.keys())):
            shapes = [list(one.tensors[name].shape) for one in (first, other)]
            sides = [[side for i, side in enumerate(shape) if i != _axis(name)] for shape in shapes]
            if sides[0] != sides[1]:
                yield f"{name}: {shapes[0]} in {first.label}, {shapes[1]} in {other.label}"


def _axis(name: str) -> int:
    """That of the rank."""
    return 0 if part_of(name).part.endswith("_A") else 1


def _path(part: Part) -> str:
    return part.module.removeprefix(PREFIX)
