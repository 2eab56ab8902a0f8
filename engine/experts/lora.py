"""A PEFT adapter from a full fine-tune: each matrix's task vector cut to a rank, everything else whole."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freemerge.checkpoint.adapter import CONFIG, tied_embedding
from freemerge.checkpoint.layout import Entry, plan_shard
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.torch_arrays import same_bytes
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter, write_file
from freemerge.errors import CheckpointError, InputError, PlanError, listed
from freemerge.kernels.array import Array, is_float, task_vector
from freemerge.match import Matcher
from freemerge.methods._linear_algebra import triplets

WEIGHTS = "adapter_model.safetensors"
EMBEDDINGS = ("embed", "wte", "wpe", "shared")  # words in the name of a layer that looks rows up: it is kept whole
RUN = 1 << 20  # elements compared at a time
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class ExtractedTensor:
    """A tensor that the fine-tune changed, or the other half of a layer that is kept whole.

    Attributes:
        kept: "lora", "whole", or "left out".
        error: ||change - what is kept of it|| / ||change||, Frobenius norms; 0 for a whole tensor.
        change: ||change||; 0 where only the other half of its layer has changed.
    """

    tensor: str
    shape: tuple[int, ...]
    kept: str
    rank: int | None
    error: float
    change: float


def total_error(rows: Sequence[ExtractedTensor]) -> float:
    """`error` of all tensors together: ||all changes - what is kept of them|| / ||all changes||."""
    return math.hypot(*(row.error * row.change for row in rows)) / math.hypot(*(row.change for row in rows))


def extract_adapter(
    base: str | os.PathLike,
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    rank: int,
    leave_out: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    fsync: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExtractedTensor]:
    """Write the adapter `out` that turns `base` into `model`, as nearly as `rank` allows.

    The change of a linear layer's matrix becomes B A, the nearest of its rank (truncated SVD), in float32, with
    lora_alpha = r. Biases, norms, embeddings, convolutions, and matrices that A and B would be larger than, are kept
    whole. Tensors are taken for weights of layers by their names, <layer>.weight and <layer>.bias.

    Args:
        rank: r.
        leave_out: leave out changed tensors that no adapter can hold, instead of refusing.
        overwrite, allow_pickle, fsync, progress: as for freemerge.merge.

    Returns:
        What the adapter holds, and what was left out.

    Raises:
        InputError: the models do not fit together, or something has changed that no adapter can hold.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    with ExitStack() as stack:
        start = stack.enter_context(open_checkpoint(base, allow_pickle=allow_pickle))
        tuned = stack.enter_context(open_checkpoint(model, allow_pickle=allow_pickle, base=base))
        cut = AdapterCut(start, tuned, rank)
        return write_adapter(cut, Path(out), leave_out, overwrite=overwrite, fsync=fsync, progress=progress)


def write_adapter(
    cut: "AdapterCut",
    out: Path,
    leave_out: bool,
    *,
    overwrite: bool,
    fsync: bool,
    progress: Callable[[int, int], None] | None,
) -> list[ExtractedTensor]:
    """Write what was cut as the adapter `out`; see extract_adapter."""
    if cut.left_out and not leave_out:
        problems = (f"{name}: {cut.why_not(name)}" for name in cut.left_out)
        raise InputError(listed(problems, "An adapter cannot hold these; pass --leave-out to do without them."))
    if not cut.low_rank:
        problem = f"{cut.tuned.label}: no matrix of a linear layer has changed that a rank of {cut.rank} makes smaller"
        raise InputError(listed([problem], "PEFT loads no adapter without one; keep the fine-tuned model."))
    with WorkDir.open(out, fingerprint="adapter", overwrite=overwrite, resume=False, fsync=fsync) as work:
        shard = plan_shard(WEIGHTS, cut.entries())
        with CheckpointWriter(work.staging, [shard], fsync=fsync) as writer:
            rows = cut.write(writer, progress)
            writer.finish()
        for checkpoint in (cut.base, cut.tuned):
            checkpoint.check_unchanged()
        write_file(work.staging / CONFIG, (json.dumps(cut.config(), indent=2) + "\n").encode())
        work.publish()
    return rows


class AdapterCut:
    """What of a fine-tune goes where: `low_rank`, `whole` and `left_out` are names of tensors.

    Args:
        only_linear: leave out all that is not made low-rank.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, rank: int, *, only_linear: bool = False):
        if rank < 1:
            raise InputError(f"rank {rank}: a whole number from 1 on")
        self.base, self.tuned, self.rank = base, tuned, rank
        matcher = Matcher(base, [tuned])
        if matcher.problems:
            raise PlanError(listed(matcher.problems, "Give a fine-tuned model and the base it was trained from."))
        sources = {match.name: match.sources[0] for match in matcher.matches if not match.same_as}
        self._sources = {name: source for name, source in sources.items() if source is not None}
        changed = [name for name in self._sources if self.has_changed(name)]
        if not changed:
            raise InputError(f"{tuned.label} is {base.label}: no tensor has changed")
        self._changed = set(changed)
        self.transposed = any(self._is_transposed(name) for name in base.tensors)
        self.low_rank = {name for name in changed if self._is_low_rank(name)}
        others = [name for name in changed if name not in self.low_rank]
        self._tied = tied_embedding(base)
        self.left_out = others if only_linear else [name for name in others if self._fits_nowhere(name)]
        # PEFT saves a layer whole or not at all
        layers = {_layer(name) for name in others if name not in self.left_out}
        parts = (f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
        self.whole = {name for name in parts if name in self._sources and name not in self.low_rank}
        self._written = [name for name in self._sources if name in {*self.low_rank, *self.whole, *self.left_out}]

    def has_changed(self, name: str) -> bool:
        return _differ(self.base.read(name), self.tuned.read(self._sources[name]))

    def change(self, name: str) -> Array:
        """What fine-tuning has added to a tensor, float32, in memory of its own."""
        return task_vector(self.base.read(name), self.tuned.read(self._sources[name])).astype(np.float32, copy=False)

    def _fits_nowhere(self, name: str) -> bool:
        return not name.endswith((".weight", ".bias")) or name == self._tied

    def why_not(self, name: str) -> str:
        """Why a tensor is left out."""
        if name == self._tied:
            return "changed, and it is the output head too, which stays as it is in PEFT"
        return "changed, but no layer's weight or bias"

    def _is_transposed(self, name: str) -> bool | None:
        """Whether a matrix is stored [in, out], by the length of its bias; None where that does not tell."""
        shape, bias = self.base.tensors[name].shape, self.base.tensors.get(f"{_layer(name)}.bias")
        if len(shape) != 2 or shape[0] == shape[1] or bias is None or name.endswith(".bias"):
            return None
        return bias.shape == shape[1:]

    def _is_low_rank(self, name: str) -> bool:
        info = self.base.tensors[name]
        if not name.endswith(".weight") or len(info.shape) != 2 or not is_float(info.dtype):
            return False
        looks_up = any(word in _layer(name).rpartition(".")[2] for word in EMBEDDINGS)
        if looks_up or self.rank * sum(info.shape) >= info.numel:
            return False
        stored = self._is_transposed(name)
        square_with_bias = info.shape[0] == info.shape[1] and f"{_layer(name)}.bias" in self.base.tensors
        return stored == self.transposed if stored is not None else not self.transposed or square_with_bias

    def entries(self) -> Iterator[Entry]:
        for name in sorted(self.low_rank):
            height, width = self.base.tensors[name].shape[:: -1 if self.transposed else 1]
            yield Entry(_key(name, "lora_A.weight"), FLOAT32, (self.rank, width))
            yield Entry(_key(name, "lora_B.weight"), FLOAT32, (height, self.rank))
        for name in sorted(self.whole):
            info = self.tuned.tensors[self._sources[name]]
            yield Entry(self._whole_key(name), info.dtype, info.shape)

    def _whole_key(self, name: str) -> str:
        # a layer with a low-rank update is wrapped, and its bias moves inwards
        wrapped = f"{_layer(name)}.weight" in self.low_rank
        return _key(name, f"base_layer.{name.rpartition('.')[2]}" if wrapped else name.rpartition(".")[2])

    def write(self, writer: CheckpointWriter, progress: Callable[[int, int], None] | None) -> list[ExtractedTensor]:
        rows, done = [], 0
        total = sum(self.base.tensors[name].nbytes for name in self._written)
        for name in self._written:
            rows.append(self._write_tensor(writer, name))
            done += self.base.tensors[name].nbytes
            if progress:
                progress(done, total)
        return rows

    def _write_tensor(self, writer: CheckpointWriter, name: str) -> ExtractedTensor:
        shape, source = self.base.tensors[name].shape, self._sources[name]
        change = self.change(name) if name in self._changed else np.zeros(0, np.float32)
        size = _norm(change)
        if not math.isfinite(size):
            raise CheckpointError(f"{name}: NaN or Inf in {self.base.label} or {self.tuned.label}")
        if name in self.whole:
            writer.write(self._whole_key(name), 0, self.tuned.read(source))
            return ExtractedTensor(name, shape, "whole", None, 0.0, size)
        if name in self.left_out:
            return ExtractedTensor(name, shape, "left out", None, 1.0, size)
        a, b, error = self._factors(change, size)
        writer.write(_key(name, "lora_A.weight"), 0, a)
        writer.write(_key(name, "lora_B.weight"), 0, b)
        return ExtractedTensor(name, shape, "lora", self.rank, error, size)

    def _factors(self, change: Array, size: float) -> tuple[Array, Array, float]:
        """A, B and the relative error of B A, for a change of the norm `size`; `change` is overwritten."""
        left, values, right = triplets(change, self.rank)
        roots = np.sqrt(values).astype(np.float32)  # shared between the two, so that both fit a narrow dtype
        left, right = left * roots, right * roots
        step = max(1, RUN // change.shape[1])
        for row in range(0, len(change), step):
            change[row : row + step] -= left[row : row + step] @ right.T
        a, b = (left.T, right) if self.transposed else (right.T, left)
        return np.ascontiguousarray(a), np.ascontiguousarray(b), _norm(change) / size

    def config(self) -> dict:
        """adapter_config.json as PEFT writes it, the keys that say something."""
        label = self.base.label
        causal = str(((self.base.config or {}).get("architectures") or [""])[0]).endswith("ForCausalLM")
        biases = any(f"{_layer(name)}.weight" in self.low_rank for name in self.whole)
        layers = sorted({_layer(name) for name in self.whole if f"{_layer(name)}.weight" not in self.low_rank})
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": os.path.abspath(label) if os.path.exists(label) else label,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "all" if biases else "none",
            "fan_in_fan_out": self.transposed,
            "target_modules": sorted(map(_layer, self.low_rank)),
            "modules_to_save": layers or None,
        }


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _key(name: str, part: str) -> str:
    return f"base_model.model.{_layer(name)}.{part}"


def _differ(base: Array, tuned: Array) -> bool:
    if base.dtype == tuned.dtype:
        return not same_bytes(base, tuned)
    a, b = base.reshape(-1), tuned.reshape(-1)
    return any(bool(np.any(a[i : i + RUN] != b[i : i + RUN])) for i in range(0, a.size, RUN))


def _norm(array: Array) -> float:
    flat = array.reshape(-1)
    runs = range(0, flat.size, RUN)
    return math.sqrt(sum(float(np.square(flat[i : i + RUN], dtype=np.float64).sum()) for i in runs))
